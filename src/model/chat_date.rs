//! `strftime_now` of chat templates: Llama 3.2's puts today's date into the system message.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// The present time (UTC) by a strftime format.
pub(super) fn now(format: &str) -> Result<String, minijinja::Error> {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    strftime(seconds, format)
}

fn strftime(seconds: u64, format: &str) -> Result<String, minijinja::Error> {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let month_name = MONTHS[month as usize - 1];
    let weekday = WEEKDAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out.push_str(&match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_string(),
            Some('b') => month_name[..3].to_string(),
            Some('A') => weekday.to_string(),
            Some('a') => weekday[..3].to_string(),
            Some('H') => format!("{:02}", time / 3600),
            Some('M') => format!("{:02}", time / 60 % 60),
            Some('S') => format!("{:02}", time % 60),
            Some('%') => "%".to_string(),
            other => {
                let shown = other.map_or(String::new(), String::from);
                return Err(minijinja::Error::new(
                    minijinja::ErrorKind::InvalidOperation,
                    format!("strftime_now: %{shown} is not supported"),
                ));
            }
        });
    }
    Ok(out)
}

/// Year, month (1–12) and day (1–31) of a number of days since 1970-01-01, Gregorian.
///
/// Years are counted from March, so that the leap day is the last day of a year; 400 such years
/// have 146,097 days.
fn civil_date(days: u64) -> (u64, u64, u64) {
    // 719,468 days lie between 0000-03-01 and 1970-01-01.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = (march_month + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let shown = |seconds| strftime(seconds, "%A %d %b %Y %H:%M:%S").unwrap();
        assert_eq!(shown(0), "Thursday 01 Jan 1970 00:00:00");
        assert_eq!(shown(951_825_599), "Tuesday 29 Feb 2000 11:59:59");
        assert_eq!(shown(1_721_952_000), "Friday 26 Jul 2024 00:00:00");
        assert_eq!(shown(4_107_542_400), "Monday 01 Mar 2100 00:00:00");
        assert_eq!(strftime(0, "100%% %m %y").unwrap(), "100% 01 70");
        assert!(strftime(0, "%Q").is_err());
        assert!(strftime(0, "%").is_err());
    }
}

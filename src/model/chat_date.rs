//! The day that chat templates name: Llama 3.2's puts today's date into the system message.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::run::clock;
use crate::run::directory::civil_date;

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

/// A day (UTC), written `2026-01-31`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Date {
    /// Since 1970-01-01.
    days: u64,
}

impl Date {
    pub fn today() -> Self {
        Self {
            days: clock::seconds() / 86_400,
        }
    }

    /// The start of the day by a strftime format.
    pub(super) fn strftime(self, format: &str) -> Result<String, minijinja::Error> {
        strftime(self.days * 86_400, format)
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil_date(self.days);
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

impl FromStr for Date {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let no_date = || format!("{text:?} is no date such as 2026-01-31, from 1970 to 9999");
        let parts: Vec<u64> = text
            .split('-')
            .map_while(|part| part.parse().ok())
            .collect();
        let &[year @ 1970..=9999, month @ 1..=12, day @ 1..=31] = parts.as_slice() else {
            return Err(no_date());
        };
        // Years that begin in March, in eras of 400: the leap day is the last of its year.
        let from_march = year - u64::from(month <= 2);
        let (era, year_of_era) = (from_march / 400, from_march % 400);
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = (era * 146_097 + day_of_era).checked_sub(719_468);
        // A day that its month does not have is another date.
        days.filter(|&days| civil_date(days) == (year, month, day))
            .map(|days| Self { days })
            .ok_or_else(no_date)
    }
}

impl TryFrom<String> for Date {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Date> for String {
    fn from(date: Date) -> Self {
        date.to_string()
    }
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
    #[test]
    fn dates_are_read_as_they_are_written() {
        for days in (0..2_932_896).step_by(17) {
            let date = Date { days };
            assert_eq!(date.to_string().parse(), Ok(date));
        }
        assert_eq!(Date { days: 19_782 }.to_string(), "2024-02-29");
        for wrong in [
            "",
            "2026",
            "2026-02-29",
            "1969-12-31",
            "2026-13-01",
            "2026-1-1-1",
            "x-1-1",
        ] {
            assert!(wrong.parse::<Date>().is_err(), "{wrong}");
        }
    }
}

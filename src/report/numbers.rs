//! Numbers for people.

/// Four significant digits; very large and very small ones with a power of ten.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor() as i32;
    if !(-4..9).contains(&magnitude) {
        return format!("{value:.2e}");
    }
    let decimals = (3 - magnitude).clamp(0, 7) as usize;
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => thousands(&text),
    }
}

/// `1 234 567` with narrow spaces.
pub fn count(value: usize) -> String {
    thousands(&value.to_string())
}

fn thousands(digits: &str) -> String {
    let (sign, digits) = match digits.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", digits),
    };
    let mut text = sign.to_owned();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && digits.len() > 4 {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// `0.762 ± 0.019`.
pub fn score(value: f64, stderr: Option<f64>) -> String {
    match stderr {
        Some(stderr) => format!("{value:.3} ± {stderr:.3}"),
        None => format!("{value:.3}"),
    }
}

/// `48 s`, `1 min 12 s`, `3 h 05 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

/// Six significant digits, which is more than a chart shows: keeps the page small.
pub fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        for (value, expected) in [
            (0.0, "0"),
            (0.402_343_75, "0.4023"),
            (0.02, "0.02"),
            (1.0, "1"),
            (123_456.7, "123\u{202f}457"),
            (1234.5, "1234"),
            (-21.25, "-21.25"),
            (1e-6, "1.00e-6"),
            (0.000_123_4, "0.0001234"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(number(value), expected, "{value}");
        }
        assert_eq!(duration(71.6), "1 min 12 s");
        assert_eq!(duration(3700.0), "1 h 01 min");
        assert_eq!(score(0.5, Some(0.0123)), "0.500 ± 0.012");
        assert_eq!(rounded(0.123_456_789), 0.123_457);
    }
}

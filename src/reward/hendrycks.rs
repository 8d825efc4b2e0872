//! String equality of answers as the code of the MATH data set (Hendrycks et al. 2021) defines it.
//!
//! No numbers are compared, only strings after a fixed sequence of replacements; the order of the
//! replacements is part of the rule. Where the reference raises an error, the answers are compared
//! as they stand.

/// Longest number, in digits, that the reference's integer conversion accepts.
const MAX_INT_DIGITS: usize = 4300;

/// Whether two answers are the same string after normalisation. Symmetric.
pub(super) fn is_equiv(a: &str, b: &str) -> bool {
    match (normalise(a), normalise(b)) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// The normalised answer, or `None` where the reference raises an error.
fn normalise(answer: &str) -> Option<String> {
    const REPLACEMENTS: [(&str, &str); 10] = [
        ("\n", ""),
        (r"\!", ""),
        (r"\\", r"\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
        (r"\$", ""),
    ];
    let mut text = answer.to_owned();
    for (from, to) in REPLACEMENTS {
        replace(&mut text, from, to);
    }
    drop_unit(&mut text)?;
    for (from, to) in [(r"\%", ""), (" .", " 0."), ("{.", "{0.")] {
        replace(&mut text, from, to);
    }
    if text.is_empty() {
        return Some(text);
    }
    if text.starts_with('.') {
        text.insert(0, '0');
    }
    drop_short_left_side(&mut text);
    let mut text = brace_roots(text)?;
    replace(&mut text, " ", "");
    let text = brace_fractions(text)?;
    if text == "0.5" {
        return Some(r"\frac{1}{2}".to_owned());
    }
    Some(slash_to_fraction(text))
}

fn replace(text: &mut String, from: &str, to: &str) {
    if text.contains(from) {
        *text = text.replace(from, to);
    }
}

/// Cuts at `\text{ ` (with the space), which starts a unit; a second one is an error.
fn drop_unit(text: &mut String) -> Option<()> {
    const UNIT: &str = r"\text{ ";
    let Some(at) = text.find(UNIT) else {
        return Some(());
    };
    if text[at + UNIT.len()..].contains(UNIT) {
        return None;
    }
    text.truncate(at);
    Some(())
}

/// `x=5` → `5`: one equals sign with at most two characters before it.
fn drop_short_left_side(text: &mut String) {
    let Some((left, right)) = text.split_once('=') else {
        return;
    };
    if !right.contains('=') && left.chars().count() <= 2 {
        *text = right.to_owned();
    }
}

/// `\sqrt3` → `\sqrt{3}`; a root at the very end is an error.
fn brace_roots(text: String) -> Option<String> {
    let mut parts = text.split(r"\sqrt");
    let mut out = parts.next()?.to_owned();
    for part in parts {
        let first = part.chars().next()?;
        out.push_str(r"\sqrt");
        if first == '{' {
            out.push_str(part);
        } else {
            out.extend(['{', first, '}']);
            out.push_str(&part[first.len_utf8()..]);
        }
    }
    Some(out)
}

/// `\frac12` → `\frac{1}{2}`, `\frac1{72}` → `\frac{1}{72}`.
///
/// `\frac` before a single last character leaves the whole text as it was; `\frac` at the very end
/// is an error.
fn brace_fractions(text: String) -> Option<String> {
    let mut parts = text.split(r"\frac");
    let mut out = parts.next()?.to_owned();
    for part in parts {
        out.push_str(r"\frac");
        let mut chars = part.chars();
        let first = chars.next()?;
        if first == '{' {
            out.push_str(part);
            continue;
        }
        let Some(second) = chars.next() else {
            return Some(text);
        };
        out.extend(['{', first, '}']);
        if second == '{' {
            out.push('{');
        } else {
            out.extend(['{', second, '}']);
        }
        out.push_str(chars.as_str());
    }
    Some(out)
}

/// `3/4` → `\frac{3}{4}` for plain integers in canonical form.
fn slash_to_fraction(text: String) -> String {
    match text.split_once('/') {
        Some((a, b)) if is_canonical_int(a) && is_canonical_int(b) => {
            format!(r"\frac{{{a}}}{{{b}}}")
        }
        _ => text,
    }
}

fn is_canonical_int(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let canonical = match digits.as_bytes() {
        [b'0'] => digits.len() == text.len(),
        [b'1'..=b'9', ..] => true,
        _ => false,
    };
    canonical && digits.len() <= MAX_INT_DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn norm(text: &str) -> String {
        normalise(text).unwrap()
    }

    #[test]
    fn shorthand_gets_braces() {
        assert_eq!(norm(r"\tfrac83"), r"\frac{8}{3}");
        assert_eq!(norm(r"\frac1{72}"), r"\frac{1}{72}");
        assert_eq!(norm(r"10\sqrt3"), r"10\sqrt{3}");
        assert_eq!(norm("-3/4"), r"\frac{-3}{4}");
        assert_eq!(norm("03/4"), "03/4");
        assert_eq!(norm("-0/4"), "-0/4");
        assert_eq!(norm("0.5"), r"\frac{1}{2}");
        assert_eq!(norm(".5"), r"\frac{1}{2}");
    }

    #[test]
    fn units_signs_and_left_sides_go() {
        assert_eq!(norm(r"10\text{ cm}"), "10");
        assert_eq!(norm(r"10\text{cm}"), r"10\text{cm}");
        assert_eq!(norm(r"\$50\%"), "50");
        assert_eq!(norm("k = 7"), "7");
        assert_eq!(norm("f(x)=7"), "f(x)=7");
        assert_eq!(norm("x=y=7"), "x=y=7");
        assert_eq!(norm(r"30^\circ"), "30");
    }

    #[test]
    fn an_error_means_plain_comparison() {
        assert_eq!(normalise(r"1\text{ a}\text{ b}"), None);
        assert_eq!(normalise(r"2\sqrt"), None);
        assert_eq!(normalise(r"\frac"), None);
        assert_eq!(norm(r"\frac1"), r"\frac1");
        assert!(is_equiv(r"2\sqrt", r"2\sqrt"));
        assert!(!is_equiv(r"2\sqrt ", r"2\sqrt"));
    }
}

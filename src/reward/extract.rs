//! Where in a completion the answer is.

/// The content of the last `\boxed`, as verl takes it.
///
/// A `\boxed` followed by a space anywhere wins: what follows the last such one, up to a `$`.
/// Otherwise the last `\boxed`'s braces are matched by counting; escaped braces count too. A
/// missing closing brace, or anything but `{` after the command, means no answer. (The reference
/// also looks for `\fbox` and then rejects it; the effect is the same.)
pub(super) fn last_boxed(text: &str) -> Option<String> {
    if let Some((_, rest)) = text.rsplit_once(r"\boxed ") {
        let end = rest.find('$').unwrap_or(rest.len());
        return Some(rest[..end].to_owned());
    }
    let start = text.rfind(r"\boxed")?;
    let rest = text[start + r"\boxed".len()..].strip_prefix('{')?;
    let mut depth = 1usize;
    for (at, byte) in rest.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(rest[..at].to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_last_box_with_its_nested_braces() {
        assert_eq!(
            last_boxed(r"\boxed{1} and \boxed{\frac{1}{2}}.").as_deref(),
            Some(r"\frac{1}{2}")
        );
        assert_eq!(last_boxed(r"\boxed{}").as_deref(), Some(""));
        assert_eq!(last_boxed(r"is $\boxed 7$ then").as_deref(), Some("7"));
        assert_eq!(last_boxed(r"\boxed {7}$").as_deref(), Some("{7}"));
    }

    #[test]
    fn refuses_unclosed_boxes_and_other_commands() {
        assert_eq!(last_boxed(r"\boxed{1} or \boxed{2"), None);
        assert_eq!(last_boxed(r"\fbox{3}"), None);
        assert_eq!(last_boxed(r"\boxed[4]{4}"), None);
        assert_eq!(last_boxed("no box"), None);
    }
}

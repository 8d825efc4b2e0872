//! Two texts for comparison: columns where the terminal is wide enough, else one after the other.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Columns narrower than this are hard to read.
const MIN_COLUMN: usize = 36;
const BETWEEN: &str = " │ ";
/// Where there is no terminal to ask.
const DEFAULT_WIDTH: usize = 100;

/// Characters in a line: what `COLUMNS` says, else the terminal.
pub fn terminal_width() -> usize {
    let stated = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
    let found = || terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    stated.or_else(found).unwrap_or(DEFAULT_WIDTH)
}

/// Two titled texts in lines of `width` characters.
pub fn render(left: (&str, &str), right: (&str, &str), width: usize) -> String {
    let column = width.saturating_sub(BETWEEN.width()) / 2;
    if column >= MIN_COLUMN {
        return columns(left, right, column);
    }
    let one = |(title, text): (&str, &str)| format!("── {title}\n{}\n", text.trim_end());
    format!("{}{}", one(left), one(right))
}

fn columns(left: (&str, &str), right: (&str, &str), width: usize) -> String {
    let column = |(title, text): (&str, &str)| {
        let mut lines = vec![title.to_string(), "─".repeat(width)];
        lines.extend(text.lines().flat_map(|line| wrap(line, width)));
        lines
    };
    let (left, right) = (column(left), column(right));
    let mut text = String::new();
    for index in 0..left.len().max(right.len()) {
        let cell = |lines: &[String]| lines.get(index).cloned().unwrap_or_default();
        let (l, r) = (cell(&left), cell(&right));
        let pad = " ".repeat(width.saturating_sub(l.width()));
        text.push_str(format!("{l}{pad}{BETWEEN}{r}").trim_end());
        text.push('\n');
    }
    text
}

/// Breaks a line at spaces so that no part is wider than `width`; a wider word is cut.
fn wrap(line: &str, width: usize) -> Vec<String> {
    // A tab's width depends on where it stands.
    let line = line.replace('\t', "    ");
    let (mut lines, mut current) = (Vec::new(), String::new());
    for (index, word) in line.split(' ').enumerate() {
        if index > 0 {
            if current.width() + 1 + word.width() <= width {
                current.push(' ');
            } else {
                lines.push(std::mem::take(&mut current));
            }
        }
        let mut used = current.width();
        for c in word.chars() {
            let own = c.width().unwrap_or(0);
            if used + own > width {
                lines.push(std::mem::take(&mut current));
                used = 0;
            }
            current.push(c);
            used += own;
        }
    }
    lines.push(current);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_wrap_at_spaces_and_long_words_are_cut() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrap("", 4), [""]);
        assert_eq!(wrap("größer als", 6), ["größer", "als"]);
        assert_eq!(wrap("  indented", 10), ["  indented"]);
        assert_eq!(wrap("漢字かな", 4), ["漢字", "かな"], "each is two wide");
    }

    #[test]
    fn columns_stay_columns_whatever_is_in_them() {
        let text = columns(("base", "a\n漢字"), ("adapter", "c d e f"), 7);
        assert_eq!(
            text,
            "base    │ adapter\n─────── │ ───────\na       │ c d e f\n漢字    │\n"
        );
    }

    #[test]
    fn narrow_terminals_get_one_after_the_other() {
        let (base, adapter) = (("base", "a b\n"), ("adapter", "c"));
        assert_eq!(render(base, adapter, 60), "── base\na b\n── adapter\nc\n");
        assert!(render(base, adapter, 80).starts_with("base "));
    }
}

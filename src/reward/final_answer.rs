//! The final answer of a completion, however it is stated.
//!
//! In order of trust: the sentence that Minerva's prompt asks for, the last boxes, the last `####`,
//! the last "answer is" or `<answer>`, a completion that is nothing but a formula, and last the
//! formula or number that ends the text. Only the end of the text is searched, and each
//! search is linear, so that long completions cost no more than short ones.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;

use super::equiv;

/// Bytes at the end of a completion that are searched.
const TAIL_BYTES: usize = 1 << 15;
/// Boxes and formulas at the end that are looked at.
const MAX_CANDIDATES: usize = 16;

/// What a completion says its answer is; `None` if it holds no box, number, formula or other sign of
/// an answer.
pub(super) fn final_answer(completion: &str) -> Option<String> {
    let tail = tail(completion);
    minerva(tail)
        .or_else(|| boxes(tail))
        .or_else(|| after_marks(tail))
        .or_else(|| after_cue(tail))
        .or_else(|| whole(tail))
        .or_else(|| last_formula_or_number(tail))
}

/// The end of the text, up to an end-of-turn mark.
fn tail(text: &str) -> &str {
    const ENDS: [&str; 4] = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>"];
    let end = ENDS
        .iter()
        .filter_map(|mark| text.find(mark))
        .min()
        .unwrap_or(text.len());
    let text = text[..end].trim_end();
    let mut start = text.len().saturating_sub(TAIL_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// "The final answer is X. I hope it is correct."
fn minerva(text: &str) -> Option<String> {
    let (statement_end, _) = text.rmatch_indices(" I hope it is correct").next()?;
    let text = &text[..statement_end];
    let (_, answer) = text.rsplit_once("final answer is")?;
    (!answer.contains('\n'))
        .then(|| statement(answer))
        .flatten()
}

/// A completion that is one formula, in its delimiters or without any and without words.
fn whole(text: &str) -> Option<String> {
    static WORD: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?:^|[^\\a-zA-Z])[a-zA-Z]{2}").expect("valid pattern"));
    if matches!(segments(text).as_slice(), [(0, end)] if *end == text.len()) {
        return Some(text.to_owned());
    }
    let bare = text.len() <= 200
        && text.contains(|c: char| c.is_ascii_digit())
        && !text.contains(['\n', '$'])
        && !WORD.is_match(text)
        && NUMBER
            .find(text)
            .is_none_or(|found| found.len() < text.len());
    (bare && equiv::is_readable(text)).then(|| text.to_owned())
}

struct Boxed<'a> {
    start: usize,
    end: usize,
    content: &'a str,
}

/// The last box that is closed and not empty. Boxes close together, as in `\boxed{2} and \boxed{3}`,
/// are one list.
fn boxes(text: &str) -> Option<String> {
    let mut found: Vec<Boxed> = text
        .rmatch_indices("boxed")
        .chain(text.rmatch_indices(r"\fbox"))
        .take(MAX_CANDIDATES)
        .filter_map(|(at, mark)| read_box(text, at, mark.len()))
        .collect();
    found.sort_by_key(|boxed| boxed.start);
    // A box in a box: the inner one alone.
    let mut last = found.pop()?;
    let mut answer = last.content.trim().to_owned();
    if starts_with_percent(&text[last.end..]) {
        answer.push_str(r"\%");
    }
    while let Some(before) = found.pop() {
        if before.end > last.start || !joins(&text[before.end..last.start]) {
            break;
        }
        answer = format!("{}, {answer}", before.content.trim());
        last = before;
    }
    Some(answer)
}

fn read_box(text: &str, at: usize, mark: usize) -> Option<Boxed<'_>> {
    let after = &text[at + mark..];
    let spaces = after.len() - after.trim_start_matches(' ').len();
    let inside = &after[spaces..];
    let (content, length) = match inside.strip_prefix('{') {
        Some(inside) => {
            let length = closing_brace(inside)?;
            (&inside[..length], spaces + length + 2)
        }
        // `\boxed 7`
        None if spaces > 0 && text[..at].ends_with('\\') => {
            let length = inside.find(['$', '\n', ' ']).unwrap_or(inside.len());
            (&inside[..length], spaces + length)
        }
        None => return None,
    };
    let boxed = Boxed {
        start: at,
        end: at + mark + length,
        content,
    };
    (!content.trim().is_empty()).then_some(boxed)
}

fn closing_brace(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Whether what stands between two boxes makes them one answer: next to nothing, "and" or "or"
/// within a sentence, or a comma without other words.
fn joins(between: &str) -> bool {
    let between = between.trim_end_matches('\\');
    let length = between.chars().count();
    if length >= 70
        || between.starts_with('.')
        || between.contains(". ")
        || between.contains("\n\n")
    {
        return false;
    }
    let words: Vec<&str> = between
        .split(|c: char| !c.is_ascii_alphabetic() && c != '\\')
        .filter(|word| word.len() > 1 && !word.starts_with('\\'))
        .collect();
    if words.is_empty() {
        return length < 10 || between.contains([',', ';']);
    }
    words.len() <= 4 && (words.contains(&"and") || words.contains(&"or"))
}

fn starts_with_percent(text: &str) -> bool {
    let text = text.trim_start_matches(['$', ' ', '}', '\\', ')']);
    ["%", "percent", "pct"]
        .iter()
        .any(|word| text.starts_with(word))
}

/// What follows the last `####`.
fn after_marks(text: &str) -> Option<String> {
    let (_, rest) = text.rsplit_once("####")?;
    let line = rest.trim_start().lines().next()?;
    statement(line)
}

/// What follows the last "answer is", "answer:", `<answer>` or the like.
fn after_cue(text: &str) -> Option<String> {
    static CUE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(
            r#"(?i)<answer>|\banswer\b[*_"\s]*(?:is|are|:|=|equals)(?:\s+now)?[*_\s:]*|答案是"#,
        )
        .expect("valid pattern")
    });
    let cue = CUE.find_iter(text).last()?;
    let rest = text[cue.end()..].trim_start();
    let rest = rest.split("</answer>").next().unwrap_or(rest);
    statement(rest.lines().next()?)
}

/// The answer in a statement of it: a formula, the statement itself if it is one, its first number.
fn statement(line: &str) -> Option<String> {
    let line = line
        .split(" I hope")
        .next()
        .unwrap_or(line)
        .replace("\\\"", "");
    let line = line.trim().trim_matches(['*', '`', '"', ' ', ':']);
    let line = line.strip_prefix("Answer:").unwrap_or(line).trim();
    match formulas(line) {
        Some((0, formula)) => return Some(formula.to_owned()),
        Some(_) => return last_formula_or_number(line),
        None => {}
    }
    let sentence = line.split(". ").next().unwrap_or(line);
    let sentence = sentence.trim_end_matches(['.', '*', '`', ' ', ',']);
    if !sentence.chars().any(char::is_alphanumeric) {
        return None;
    }
    if equiv::is_readable(sentence) {
        return Some(sentence.to_owned());
    }
    let number = NUMBER
        .find_iter(sentence)
        .find_map(|found| number(sentence, found));
    Some(number.map_or_else(|| sentence.to_owned(), |(_, number)| number))
}

/// From the first formula of a line to the last that belongs with it, and where it starts.
fn formulas(line: &str) -> Option<(usize, &str)> {
    let segments = segments(line);
    let (first, mut end) = segments.first().copied()?;
    for (start, next_end) in &segments[1..] {
        if line[end..*start].chars().count() > 12 {
            break;
        }
        end = *next_end;
    }
    Some((first, &line[first..end])).filter(|(_, formula)| equiv::is_readable(formula))
}

/// The last formula that can be read or the last number, whichever comes later.
fn last_formula_or_number(text: &str) -> Option<String> {
    let numbers = NUMBER
        .find_iter(text)
        .filter_map(|found| number(text, found));
    let number = numbers.last();
    let formula = segments(text)
        .into_iter()
        .rev()
        .take(MAX_CANDIDATES)
        .find(|(start, end)| equiv::is_readable(&text[*start..*end]));
    match (formula, number) {
        (Some((start, end)), number) if number.as_ref().is_none_or(|(at, _)| *at < end) => {
            let percent = if starts_with_percent(&text[end..]) {
                r"\%"
            } else {
                ""
            };
            Some(format!("{}{percent}", &text[start..end]))
        }
        (_, number) => number.map(|(_, number)| number),
    }
}

/// Where formulas are: `$…$` and `\(…\)` within a line, `$$…$$` and `\[…\]` across lines. Start and
/// end include the delimiters.
fn segments(text: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(offset) = text[at..].find(['$', '\\']) {
        at += offset;
        let rest = &text[at..];
        let (open, close, in_line) = if rest.starts_with("$$") {
            (2, "$$", false)
        } else if rest.starts_with('$') {
            (1, "$", true)
        } else if rest.starts_with(r"\[") {
            (2, r"\]", false)
        } else if rest.starts_with(r"\(") {
            (2, r"\)", true)
        } else {
            // An escaped character or a command.
            at += 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
            continue;
        };
        let inside = &rest[open..];
        let inside = if in_line {
            inside.lines().next().unwrap_or("")
        } else {
            inside
        };
        match find_unescaped(inside, close) {
            Some(length) => {
                let end = at + open + length + close.len();
                found.push((at, end));
                at = end;
            }
            None if in_line => at += open,
            // Nothing closes it: nothing after it is a display either.
            None => break,
        }
    }
    found
}

fn find_unescaped(text: &str, mark: &str) -> Option<usize> {
    text.match_indices(mark)
        .map(|(at, _)| at)
        .find(|at| !text[..*at].ends_with('\\'))
}

static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"[-−]?\$?(?:\d{1,3}(?: \d{3})+\b|\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s?\\?%|\s(?:percent|pct)\b)?")
        .expect("valid pattern")
});

/// A number of running text with its place; none inside a word. A comma before other than three
/// digits is a decimal comma.
fn number(text: &str, found: regex::Match) -> Option<(usize, String)> {
    let before = text[..found.start()].chars().next_back();
    let raw = found.as_str().trim_end_matches(',');
    let raw = match before {
        Some(c) if c.is_alphabetic() => return None,
        Some(c) if c.is_alphanumeric() || c == ')' => raw.trim_start_matches(['-', '−']),
        _ => raw,
    };
    let decimal_comma = raw.split_once(',').is_some_and(|(whole, fraction)| {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        !fraction.contains([',', '.'])
            && (digits != 3 || whole.trim_start_matches(['-', '−', '$']) == "0")
    });
    let text: Cow<str> = if decimal_comma {
        raw.replace(',', ".").into()
    } else {
        raw.into()
    };
    Some((found.end(), text.replace('$', "")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cases: &[(&str, &str)]) {
        for (text, expected) in cases {
            assert_eq!(final_answer(text).as_deref(), Some(*expected), "{text}");
        }
    }

    #[test]
    fn boxes_win_and_close_ones_are_joined() {
        check(&[
            (
                r"\boxed{1}. Later: $\boxed{\frac{1}{2}}$. #### 3",
                r"\frac{1}{2}",
            ),
            (r"$\boxed{2} \quad \text{and} \quad \boxed{3}$", "2, 3"),
            (
                r"\boxed{1} is wrong, and after a long reflection about all of it we find \boxed{2}",
                "2",
            ),
            (r"\boxed{\boxed{4}}", "4"),
            (r"$\boxed{28}$ percent", r"28\%"),
            (r"it is $\boxed 7$.", "7"),
            (r"we first get $\boxed{1}$, but in truth $\boxed{2}$", "2"),
            (r"\boxed{5} and then \boxed{", "5"),
            (r"\boxed{} so 6", "6"),
        ]);
    }

    #[test]
    fn statements_come_next() {
        check(&[
            ("3 + 4\n#### 7 apples", "7 apples"),
            ("#### 9 (since 14 would be too many)", "9"),
            ("The answer is 7. (See step 2 of the 3 steps.)", "7"),
            (
                "The final answer is $\\frac14$. I hope it is correct.",
                "$\\frac14$",
            ),
            ("**Final Answer:** 10000", "10000"),
            ("<answer>19</answer>", "19"),
            ("the answer is that there are 8 of one kind", "8"),
            ("The answer is no solution.", "no solution"),
            ("Final Answer: The largest $n$ is 34.", "34"),
            (
                r"\boxed{2}, so the final answer is $3$. I hope it is correct.",
                "$3$",
            ),
            (r"\frac{10}{9}", r"\frac{10}{9}"),
        ]);
    }

    #[test]
    fn the_last_formula_or_number_is_the_last_resort() {
        check(&[
            ("so there are 49 boys.", "49"),
            ("we pay $25*4=$100 on food", "100"),
            (r"so the value is \[30^\circ\]", r"\[30^\circ\]"),
            ("it costs 1,234.50 euros", "1,234.50"),
            ("it costs 2,74 euros", "2.74"),
            ("a rise of −3/4", "−3/4"),
            ("grew 50% in 2", "2"),
        ]);
        assert_eq!(final_answer("AZYUK2A"), None);
        assert_eq!(final_answer("I do not know."), None);
        assert_eq!(final_answer("#### "), None);
    }

    #[test]
    fn long_texts_with_many_openings_take_no_time() {
        let start = std::time::Instant::now();
        for part in [
            r"\boxed{",
            "$",
            r"\[",
            "####",
            "answer is ",
            "1,",
            "{",
            "\\",
        ] {
            final_answer(&part.repeat(1_000_000 / part.len()));
        }
        assert!(start.elapsed().as_secs_f64() < 2.0);
    }
}

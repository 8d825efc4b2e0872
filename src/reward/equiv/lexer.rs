//! Text → tokens. Everything that is only notation ends here: spacing, sizes of brackets, variants
//! of a command, currency and dollar signs, thousands separators.

use super::{Notation, symbols};

/// One token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// A number without separators: digits, at most one dot, an optional exponent (`1.5e-3`).
    Number(String),
    /// A variable of one letter, Greek letters as themselves.
    Letter(char),
    /// Two or more ASCII letters side by side outside any command.
    Word(String),
    /// The content of `\text{…}` and of multi-letter `\mathrm{…}`.
    Text(String),
    /// A command that is not mere notation, without its backslash.
    Command(String),
    /// An environment's start or end.
    Begin(String),
    End(String),
    /// Punctuation and operators in one canonical character each; see [`symbols::operator`].
    /// TeX braces are `{ }`, printed braces `⦃ ⦄`, the row separator is `⏎`.
    Op(char),
    /// A character without a meaning here.
    Unknown(char),
}

impl Token {
    /// Whether the token separates the items of an answer.
    pub(super) fn is_separator(&self) -> bool {
        match self {
            Self::Op(op) => matches!(op, ',' | ';'),
            Self::Word(word) => matches!(word.as_str(), "and" | "or"),
            Self::Text(text) => matches!(text.trim_matches([',', ';', ' ']), "and" | "or" | ""),
            _ => false,
        }
    }

    /// Whether the token is the word "or".
    pub(super) fn is_or(&self) -> bool {
        match self {
            Self::Word(word) => word == "or",
            Self::Text(text) => text.trim_matches([',', ';', ' ']) == "or",
            _ => false,
        }
    }
}

/// Splits `text` into tokens. Linear in the length of the text; never fails.
pub(super) fn tokens(text: &str, notation: Notation) -> Vec<Token> {
    let mut lexer = Lexer {
        rest: text,
        out: Vec::new(),
        brackets: 0,
        environments: 0,
        spaced: false,
        wide: notation == Notation::Wide,
    };
    while let Some(c) = lexer.rest.chars().next() {
        lexer.step(c);
    }
    lexer.out
}

struct Lexer<'a> {
    rest: &'a str,
    out: Vec<Token>,
    /// Open printed brackets: a plain comma between digits separates items there.
    brackets: usize,
    /// Open environments, in which `\\\\` ends a row.
    environments: usize,
    /// White space stands before the rest.
    spaced: bool,
    wide: bool,
}

impl Lexer<'_> {
    fn step(&mut self, c: char) {
        let spaced = c.is_whitespace();
        self.read(c);
        self.spaced = spaced;
    }

    fn read(&mut self, c: char) {
        match c {
            '\\' => self.command(),
            '0'..='9' | '.' if self.number() => {}
            'a'..='z' | 'A'..='Z' => self.word(),
            '<' | '>' | '!' if self.rest[1..].starts_with('=') => {
                self.rest = &self.rest[2..];
                self.out.push(Token::Op(match c {
                    '<' => '≤',
                    '>' => '≥',
                    _ => '≠',
                }));
            }
            _ if c.is_whitespace() || matches!(c, '$' | '~' | '"' | '\u{200b}') => self.skip(c),
            _ => {
                self.skip(c);
                self.character(c);
            }
        }
    }

    fn skip(&mut self, c: char) {
        self.rest = &self.rest[c.len_utf8()..];
    }

    fn character(&mut self, c: char) {
        if self.wide && c == '*' && self.rest.starts_with('*') {
            self.skip('*');
            return self.push('^');
        }
        if let Some(op) = symbols::symbol(c) {
            return self.push(op);
        }
        if c == 'π' || ('Α'..='ω').contains(&c) {
            return self.out.push(Token::Letter(c));
        }
        if self.wide {
            if let Some(op) = symbols::wide_symbol(c) {
                return self.push(op);
            }
            if c == '√' {
                return self.out.push(Token::Command("sqrt".to_owned()));
            }
            if let Some((above, below)) = symbols::vulgar_fraction(c) {
                self.out.push(Token::Command("frac".to_owned()));
                for part in [above, below] {
                    self.out.extend([
                        Token::Op('{'),
                        Token::Number(part.to_owned()),
                        Token::Op('}'),
                    ]);
                }
                return;
            }
            if let Some(digit) = "⁰¹²³⁴⁵⁶⁷⁸⁹".chars().position(|d| d == c) {
                self.push('^');
                return self.out.push(Token::Number(digit.to_string()));
            }
            if matches!(c, '£' | '€' | '¥' | '₹') {
                return;
            }
        }
        self.out.push(Token::Unknown(c));
    }

    fn push(&mut self, op: char) {
        match op {
            '(' | '[' | '⦃' => self.brackets += 1,
            ')' | ']' | '⦄' => self.brackets = self.brackets.saturating_sub(1),
            _ => {}
        }
        self.out.push(Token::Op(op));
    }

    /// A number at the start of the rest; `false` for a dot that starts none.
    fn number(&mut self) -> bool {
        let bytes = self.rest.as_bytes();
        let digits = |from: usize| {
            bytes[from..]
                .iter()
                .take_while(|b| b.is_ascii_digit())
                .count()
        };
        let mut literal = String::new();
        let mut at = digits(0);
        literal.push_str(&self.rest[..at]);
        if (1..=3).contains(&at) {
            let plain_comma = self.brackets == 0 && !self.in_tight_list();
            while let Some(length) = separator(&self.rest[at..], plain_comma) {
                if digits(at + length) != 3 {
                    break;
                }
                literal.push_str(&self.rest[at + length..at + length + 3]);
                at += length + 3;
            }
        }
        if bytes.get(at) == Some(&b'.') {
            let fraction = digits(at + 1);
            if fraction > 0 {
                literal.push_str(&self.rest[at..at + 1 + fraction]);
                at += 1 + fraction;
            } else if at > 0 && bytes.get(at + 1).is_some_and(|b| b"/*+-^".contains(b)) {
                at += 1;
            }
        }
        if at == 0 {
            return false;
        }
        if let Some(b'e' | b'E') = bytes.get(at) {
            let sign = usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
            let exponent = if bytes.len() > at + 1 + sign {
                digits(at + 1 + sign)
            } else {
                0
            };
            if exponent > 0 {
                literal.push('e');
                literal.push_str(&self.rest[at + 1..at + 1 + sign + exponent]);
                at += 1 + sign + exponent;
            }
        }
        self.out.push(Token::Number(literal));
        self.rest = &self.rest[at..];
        true
    }

    /// Whether the rest goes on with a list without spaces, `27,54,108`: its commas separate items.
    fn in_tight_list(&self) -> bool {
        let after_number = matches!(self.out.as_slice(), [.., Token::Number(_), Token::Op(',')]);
        after_number && !self.spaced
    }

    fn word(&mut self) {
        let length = self
            .rest
            .bytes()
            .take_while(u8::is_ascii_alphabetic)
            .count();
        let (word, rest) = self.rest.split_at(length);
        self.rest = rest;
        let mut chars = word.chars();
        let token = match (chars.next(), chars.next()) {
            (Some(letter), None) => Token::Letter(letter),
            _ => match word {
                "inf" | "infty" | "infinity" | "Infinity" => Token::Op('∞'),
                "percent" | "pct" | "percentage" => Token::Op('%'),
                // `3 sqrt(2)`: a plain root after a space is read by none of the graders in use.
                "sqrt" if self.spaced && !self.wide => Token::Unknown('√'),
                "pi" if self.wide => Token::Letter('π'),
                "USD" | "EUR" | "GBP" if self.wide => return,
                _ if self.wide && self.scale(word) => return,
                _ => Token::Word(word.to_owned()),
            },
        };
        self.out.push(token);
    }

    /// `50 thousand`: writes the factor for a word of scale after a number.
    fn scale(&mut self, word: &str) -> bool {
        let zeros = match word {
            "thousand" => 3,
            "million" => 6,
            "billion" => 9,
            _ => return false,
        };
        if !matches!(self.out.last(), Some(Token::Number(_))) {
            return false;
        }
        self.out.extend([
            Token::Op('*'),
            Token::Number(format!("1{}", "0".repeat(zeros))),
        ]);
        true
    }

    fn command(&mut self) {
        let after = &self.rest[1..];
        if self.environments == 0
            && after
                .strip_prefix('\\')
                .is_some_and(symbols::starts_known_command)
        {
            // `\\frac`: one backslash too many, as escaping leaves it.
            self.rest = after;
            return;
        }
        let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let length = if letters > 0 {
            letters
        } else {
            after.chars().next().map_or(0, char::len_utf8)
        };
        let (name, rest) = after.split_at(length);
        self.rest = rest;
        if name == " "
            && !self.wide
            && rest.bytes().take(2).filter(u8::is_ascii_alphabetic).count() == 2
        {
            // `40\ books`: a word after a control space is prose.
            self.out.push(Token::Unknown(' '));
        } else if symbols::is_spacing(name) {
            if matches!(name, "left" | "right") && rest.trim_start().starts_with('.') {
                self.rest = &rest.trim_start()[1..];
            }
        } else if self.wide && symbols::is_wide_spacing(name) {
        } else if let Some(op) = symbols::operator(name) {
            if name == "\\" {
                self.row_end();
            }
            self.push(op);
        } else if let Some(letter) = symbols::greek(name) {
            self.out.push(Token::Letter(letter));
        } else if symbols::is_text_command(name) && (self.wide || name != "textup") {
            self.text();
        } else if symbols::is_font_command(name) {
            self.font();
        } else {
            self.other_command(name);
        }
    }

    fn other_command(&mut self, name: &str) {
        let token = match name {
            "dfrac" | "tfrac" | "cfrac" => Token::Command("frac".to_owned()),
            "dbinom" | "tbinom" => Token::Command("binom".to_owned()),
            "begin" | "end" => {
                let environment = self.argument().unwrap_or_default().to_owned();
                if name == "end" {
                    self.environments = self.environments.saturating_sub(1);
                    Token::End(environment)
                } else {
                    self.environments += 1;
                    if environment == "array" {
                        self.argument();
                    }
                    Token::Begin(environment)
                }
            }
            "degree" if self.wide => Token::Op('°'),
            "lbrace" if self.wide => Token::Op('⦃'),
            "rbrace" if self.wide => Token::Op('⦄'),
            "langle" if self.wide => Token::Op('⟨'),
            "rangle" if self.wide => Token::Op('⟩'),
            "phantom" | "hphantom" | "vphantom" | "hspace" | "vspace" => {
                if self.argument().is_none() {
                    let next = self.rest.trim_start().chars().next();
                    self.rest = &self.rest.trim_start()[next.map_or(0, char::len_utf8)..];
                }
                return;
            }
            // `\sqrtx`, `\quadx_2`: a command glued to the letters after it.
            _ => match ["sqrt", "qquad", "quad"]
                .into_iter()
                .find_map(|known| name.strip_prefix(known).map(|rest| (known, rest)))
            {
                Some((known, glued)) if !glued.is_empty() => {
                    if known == "sqrt" {
                        self.out.push(Token::Command(known.to_owned()));
                    }
                    return self.out.extend(glued.chars().map(Token::Letter));
                }
                _ => Token::Command(name.to_owned()),
            },
        };
        self.out.push(token);
    }

    /// `\\[1ex]`: the extra space after a row.
    fn row_end(&mut self) {
        if !self.wide {
            return;
        }
        if let Some(rest) = self.rest.strip_prefix('[')
            && let Some(end) = rest.find(']').filter(|end| *end <= 8)
            && rest[..end].ends_with(|c: char| c.is_ascii_alphabetic())
        {
            self.rest = &rest[end + 1..];
        }
    }

    /// Content of a `{…}` at the start of the rest, braces balanced; to the end if it is not closed.
    fn argument(&mut self) -> Option<&str> {
        let start = self.rest.trim_start();
        let inner = start.strip_prefix('{')?;
        let mut depth = 0usize;
        for (at, byte) in inner.bytes().enumerate() {
            match byte {
                b'{' => depth += 1,
                b'}' if depth == 0 => {
                    self.rest = &inner[at + 1..];
                    return Some(&inner[..at]);
                }
                b'}' => depth -= 1,
                _ => {}
            }
        }
        self.rest = "";
        Some(inner)
    }

    fn text(&mut self) {
        if let Some(content) = self.argument() {
            let content = content.trim().trim_matches('~').to_owned();
            let token = match content.as_str() {
                "%" | r"\%" | "percent" | "pct" => Token::Op('%'),
                _ if self.wide && self.scale(&content) => return,
                _ => Token::Text(content),
            };
            self.out.push(token);
        }
    }

    /// `\mathrm{cm}` is a word, `\mathrm{x}` and `\mathbf{10}` are their content.
    fn font(&mut self) {
        let start = self.rest.trim_start();
        let Some(inner) = start.strip_prefix('{') else {
            return;
        };
        let end = inner.find(['{', '}', '\\']).unwrap_or(inner.len());
        let content = inner[..end].trim_matches(|c: char| c.is_whitespace() || c == '~');
        // An upright letter after a number or in a quotient of units is a unit.
        let is_unit = inner.starts_with(['~', ' '])
            || match self.out.as_slice() {
                [.., Token::Number(_)] => !matches!(content, "e" | "i" | "d"),
                [.., Token::Text(_), Token::Op('/' | '*' | '-')] => true,
                _ => false,
            };
        let is_word = (inner[end..].starts_with('}') || end == inner.len())
            && (content.len() > 1 || (content.len() == 1 && is_unit))
            && content
                .chars()
                .all(|c| c.is_alphabetic() || " ~.-".contains(c));
        // A sentence set as mathematics is no text to the graders in use.
        let is_sentence = content.ends_with('.') && content.split(' ').count() >= 4;
        if is_sentence && !self.wide {
            self.out.push(Token::Command("mathrm".to_owned()));
        } else if is_word {
            self.out.push(Token::Text(content.to_owned()));
            self.rest = inner.get(end + 1..).unwrap_or_default();
        }
    }
}

/// Length of a thousands separator at the start of `rest`. A plain comma counts only outside
/// brackets; `\!` after a comma makes it a separator everywhere, and so it does after an "and" that
/// took the comma's place.
fn separator(rest: &str, plain_comma: bool) -> Option<usize> {
    for candidate in [
        r",\! ",
        r",\!",
        r"\text{ and }\!",
        "{,}",
        " {, }",
        r"\,",
        r"\!",
    ] {
        if rest.starts_with(candidate) {
            return Some(candidate.len());
        }
    }
    let plain = rest.starts_with(' ') || (plain_comma && rest.starts_with(','));
    plain.then_some(1)
}

//! What commands and characters mean: the tables of the lexer.

/// Canonical operator of a LaTeX command.
pub(super) fn operator(command: &str) -> Option<char> {
    Some(match command {
        "cdot" | "times" | "ast" | "bullet" => '*',
        "div" => '/',
        "le" | "leq" | "leqslant" | "leslant" | "leqq" => '≤',
        "ge" | "geq" | "geqslant" | "geslant" | "geqq" => '≥',
        "ne" | "neq" => '≠',
        "lt" => '<',
        "gt" => '>',
        "approx" | "simeq" | "cong" | "sim" | "thickapprox" => '≈',
        "equiv" => '≡',
        "in" => '∈',
        "cup" | "bigcup" => '∪',
        "cap" | "bigcap" => '∩',
        "setminus" | "backslash" => '∖',
        "pm" => '±',
        "mp" => '∓',
        "infty" => '∞',
        "mid" | "vert" | "lvert" | "rvert" => '|',
        "Vert" | "lVert" | "rVert" | "|" => '‖',
        "{" => '⦃',
        "}" => '⦄',
        "%" => '%',
        "\\" | "cr" | "newline" => '⏎',
        "prime" => '\'',
        "colon" => ':',
        "lbrack" => '[',
        "rbrack" => ']',
        "lparen" => '(',
        "rparen" => ')',
        "to" | "rightarrow" | "Rightarrow" | "implies" => '→',
        _ => return None,
    })
}

/// Canonical operator of a character outside commands.
pub(super) fn symbol(c: char) -> Option<char> {
    Some(match c {
        '+' | '-' | '*' | '/' | '^' | '_' | '(' | ')' | '[' | ']' | '{' | '}' | '|' | '<' | '>'
        | '=' | ',' | ';' | ':' | '!' | '%' | '&' | '\'' | '.' => c,
        '−' => '-',
        '×' | '·' | '⋅' => '*',
        '÷' => '/',
        '≤' | '⩽' => '≤',
        '≥' | '⩾' => '≥',
        '≠' | '≈' | '∈' | '∪' | '∩' | '±' | '∓' => c,
        _ => return None,
    })
}

/// Operators that only [`Notation::Wide`] reads.
pub(super) fn wide_symbol(c: char) -> Option<char> {
    Some(match c {
        '–' | '—' | '‐' | '‑' | '﹣' | '－' => '-',
        '∞' => '∞',
        '°' | 'º' => '°',
        '⁄' | '∕' => '/',
        '′' | '’' => '\'',
        '∙' | '•' | '∗' => '*',
        '∖' => '∖',
        '⟨' | '〈' => '⟨',
        '⟩' | '〉' => '⟩',
        '，' => ',',
        _ => return None,
    })
}

/// Greek letters by command name, variants folded.
pub(super) fn greek(command: &str) -> Option<char> {
    Some(match command {
        "alpha" => 'α',
        "beta" => 'β',
        "gamma" => 'γ',
        "delta" => 'δ',
        "epsilon" | "varepsilon" => 'ε',
        "zeta" => 'ζ',
        "eta" => 'η',
        "theta" | "vartheta" => 'θ',
        "iota" => 'ι',
        "kappa" => 'κ',
        "lambda" => 'λ',
        "mu" => 'μ',
        "nu" => 'ν',
        "xi" => 'ξ',
        "pi" | "varpi" => 'π',
        "rho" | "varrho" => 'ρ',
        "sigma" | "varsigma" => 'σ',
        "tau" => 'τ',
        "upsilon" => 'υ',
        "phi" | "varphi" => 'φ',
        "chi" => 'χ',
        "psi" => 'ψ',
        "omega" => 'ω',
        "Gamma" => 'Γ',
        "Delta" => 'Δ',
        "Theta" => 'Θ',
        "Lambda" => 'Λ',
        "Xi" => 'Ξ',
        "Pi" => 'Π',
        "Sigma" => 'Σ',
        "Phi" => 'Φ',
        "Psi" => 'Ψ',
        "Omega" => 'Ω',
        "ell" => 'ℓ',
        "imath" => 'i',
        "jmath" => 'j',
        "hbar" => 'ℏ',
        _ => return None,
    })
}

/// Commands without meaning for the value.
pub(super) fn is_spacing(command: &str) -> bool {
    matches!(
        command,
        "," | ";"
            | ":"
            | "!"
            | ">"
            | " "
            | "\n"
            | "\t"
            | "$"
            | "/"
            | "("
            | ")"
            | "["
            | "]"
            | "quad"
            | "qquad"
            | "left"
            | "right"
            | "displaystyle"
            | "textstyle"
            | "limits"
            | "nolimits"
            | "thinspace"
            | "enspace"
            | "nobreak"
            | "hfill"
    )
}

/// Commands of size, weight and side that [`Notation::Wide`] skips.
pub(super) fn is_wide_spacing(command: &str) -> bool {
    matches!(
        command,
        "big"
            | "Big"
            | "bigg"
            | "Bigg"
            | "bigl"
            | "bigr"
            | "Bigl"
            | "Bigr"
            | "biggl"
            | "biggr"
            | "middle"
            | "large"
            | "Large"
            | "LARGE"
            | "huge"
            | "small"
            | "normalsize"
            | "bf"
            | "rm"
            | "it"
            | "bfseries"
            | "color"
            | "pounds"
            | "euro"
    )
}

/// Commands whose content is text.
pub(super) fn is_text_command(command: &str) -> bool {
    matches!(
        command,
        "text"
            | "mbox"
            | "textnormal"
            | "textrm"
            | "textbf"
            | "textit"
            | "textsf"
            | "texttt"
            | "hbox"
            | "textup"
    )
}

/// Font commands: their content is mathematics unless it is a word.
pub(super) fn is_font_command(command: &str) -> bool {
    matches!(
        command,
        "mathrm"
            | "mathbf"
            | "mathit"
            | "mathsf"
            | "mathtt"
            | "mathnormal"
            | "operatorname"
            | "boldsymbol"
            | "bm"
    )
}

/// Whether the text starts with the name of a command that is common in answers.
pub(super) fn starts_known_command(text: &str) -> bool {
    const NAMES: [&str; 18] = [
        "left", "right", "frac", "dfrac", "tfrac", "sqrt", "text", "boxed", "pi", "le", "ge",
        "leq", "geq", "cup", "cap", "in", "infty", "cdot",
    ];
    let letters = text.bytes().take_while(u8::is_ascii_alphabetic).count();
    NAMES.contains(&&text[..letters])
}

/// Numerator and denominator of `½` and the like.
pub(super) fn vulgar_fraction(c: char) -> Option<(&'static str, &'static str)> {
    Some(match c {
        '½' => ("1", "2"),
        '⅓' => ("1", "3"),
        '⅔' => ("2", "3"),
        '¼' => ("1", "4"),
        '¾' => ("3", "4"),
        '⅕' => ("1", "5"),
        '⅖' => ("2", "5"),
        '⅗' => ("3", "5"),
        '⅘' => ("4", "5"),
        '⅙' => ("1", "6"),
        '⅚' => ("5", "6"),
        '⅛' => ("1", "8"),
        '⅜' => ("3", "8"),
        '⅝' => ("5", "8"),
        '⅞' => ("7", "8"),
        _ => return None,
    })
}

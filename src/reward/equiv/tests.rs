//! Rules by kind, each as answers that are equal and answers that are not.

use super::{Notation, equal, is_readable};

#[track_caller]
fn check(notation: Notation, expected: bool, pairs: &[(&str, &str)]) {
    for (a, b) in pairs {
        assert_eq!(equal(a, b, notation), expected, "{a} | {b}");
        assert_eq!(equal(b, a, notation), expected, "{b} | {a} (turned)");
    }
}

#[track_caller]
fn same(pairs: &[(&str, &str)]) {
    check(Notation::Standard, true, pairs);
    check(Notation::Wide, true, pairs);
}

#[track_caller]
fn different(pairs: &[(&str, &str)]) {
    check(Notation::Standard, false, pairs);
    check(Notation::Wide, false, pairs);
}

#[test]
fn numbers() {
    same(&[
        ("1000", "1,000.0"),
        ("1234567", r"1,\!234{,}567"),
        ("0.5", r"\frac12"),
        ("-0.75", r"-\tfrac{3}{4}"),
        ("042", "+42.00"),
        ("1.5e3", r"1.5 \times 10^{3}"),
        ("3e6", "18e"),
        ("1e-8", "e-8"),
        ("7/3", r"2\frac{1}{3}"),
        ("0.1\\overline{6}", "1/6"),
        ("2/3", "0.666667"),
        ("120", "5!"),
        ("twelve", "12"),
        ("2^{4000}", "4 \\cdot 2^{3998}"),
        (r"\frac{1}{2", r"\frac{1}{2}"),
    ]);
    different(&[
        ("17", "17.00001"),
        ("17", "-17"),
        ("10000", "10001"),
        ("3e6", "3e7"),
        ("some 5 30 N-m", "some 530 N-m"),
        ("1/3", "0.3333"),
        ("2/3", "0.666668"),
        ("0.05", "5"),
        ("12", "1, 2"),
        ("98721", "98, 721"),
        ("5", ""),
        ("", ""),
        (r"\frac{1}{23}", r"\frac{12}{3}"),
        ("2^{4000}", "2^{4000}+1"),
    ]);
}

#[test]
fn percent_money_units_degrees_and_bases() {
    same(&[
        (r"50\%", "0.5"),
        (r"50\%", "50"),
        (r"12.5\%", "12.5 percent"),
        (r"\$1,200", "1200"),
        (r"5\text{ cm}", "5"),
        (r"4000/49 \mathrm{~m}/\mathrm{s}^2", r"\frac{4000}{49}"),
        ("21 square feet", "21"),
        (r"30^\circ", "30"),
        (r"\cos 60^\circ", "1/2"),
        ("204_5", "204_{5}"),
        ("30", "30_{10}"),
    ]);
    different(&[
        (r"50\%", "5000"),
        (r"0.17\%", "0.17"),
        (r"7800\%", r"78\%"),
        (r"30^\circ", r"\frac{\pi}{6}"),
        ("204_5", "204_6"),
        ("204_5", "204"),
        ("5x", "5"),
        ("50i", "50"),
    ]);
}

#[test]
fn expressions() {
    same(&[
        (r"5\sqrt{2}", r"\sqrt{50}"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        (r"3-2\sqrt{2}", r"(\sqrt{2}-1)^2"),
        (r"\sqrt[3]{-8}", "-2"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
        (r"\sec^2 y", r"\tan^2(y)+1"),
        (r"\ln(2x)+c", r"c+\ln 2+\ln x"),
        (r"2\sin b\cos a", r"\cos(a)\cdot 2\sin(b)"),
        (r"1+i\sqrt{3}", r"2e^{i\pi/3}"),
        (r"\sqrt{x^2}", "|x|"),
        (r"\binom{5}{2}", "10"),
        (
            r"\lfloor\sqrt{n-1}\rfloor",
            r"\left\lfloor{\sqrt{n-1}}\right\rfloor",
        ),
        (r"\sum_{k=0}^{n} a_k b_k", r"\sum_{k=0}^n b_k a_k"),
        (r"{n(n+1) \over 2}", r"\frac{n^2+n}{2}"),
    ]);
    different(&[
        (r"5\sqrt{2}", r"5\sqrt{3}"),
        (r"\sqrt{5}", r"\sqrt[3]{5}"),
        ("x+1", "y+1"),
        ("x+1", "-x-1"),
        (r"\sqrt{x^2}", "x"),
        (r"10^{20}+\sqrt{2}", r"10^{20}+\sqrt{3}"),
        (r"2^{k-n}", r"2^{k-n}+C"),
        (r"\sum_{k=0}^{n} a_k", r"\sum_{k=1}^{n} a_k"),
        ("a_1", "a_2"),
        (r"9\pi", "9"),
    ]);
}

#[test]
fn equations_and_inequalities() {
    same(&[
        ("x=5", "5"),
        ("f(x) = 2x", "2x"),
        ("5", "187-182=5"),
        (r"\frac{1}{3}", r"P = \frac{1}{3} \approx 0.33"),
        ("y=2x+1", "2x-y+1=0"),
        (r"\frac{x^2}{4}+\frac{y^2}{3}=1", "3x^2+4y^2=12"),
        ("x=5", "-x=-5"),
        ("x>5", "5<x"),
        ("x<1", "-x>-1"),
        (r"-2\le x\le 7", r"7\ge x\ge-2"),
        (r"x\in[2,5)", "[2,5)"),
        (r"x\in[2,5)", r"2\le x<5"),
    ]);
    different(&[
        ("x=5", "z=5"),
        ("x=12", "2x=24"),
        ("a+3z=0", "0"),
        ("7=11a+c", "11a+c"),
        ("x>5", "x<5"),
        ("x>5", r"x\ge 5"),
        ("2x-y+2z-18=0", "2x-y+2z-18"),
        ("y=2x+1", "y=2x-1"),
        ("2<x<5", "[2,5)"),
        ("x>3", r"(-\infty,3)"),
        ("0.56=56\\%", "0.57=57\\%"),
    ]);
}

#[test]
fn collections() {
    same(&[
        ("1,2", "2,1"),
        ("1, 2 and 3", r"\{3,2,1\}"),
        (
            "27,54,108,135",
            r"27\text{ and }54\text{ and }108\text{ and }135",
        ),
        ("7,3", "(7,3)"),
        ("3,5,7", "3,5,7,3"),
        ("(1,2)", r"\left(1, 2\right)"),
        ("(x,y)=(5,8)", "(5,8)"),
        ("x=5, y=8", "(5,8)"),
        (r"3\pm 2\sqrt2", r"3+2\sqrt{2}, 3-2\sqrt{2}"),
        (r"(0,1)\cup(2,3]", r"(2,3]\cup(0,1)"),
        (r"\mathbb{R}", r"(-\infty,\infty)"),
        (r"\emptyset", r"\{\}"),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"\left[\begin{array}{cc}1&2\\3&4.0\end{array}\right]",
        ),
        (
            r"\frac{1}{2}\begin{pmatrix}2\\4\end{pmatrix}",
            r"\begin{bmatrix}1\\2\end{bmatrix}",
        ),
        (
            r"\begin{pmatrix}1&1\\0&1\end{pmatrix}\begin{pmatrix}1&1\\0&1\end{pmatrix}",
            r"\begin{pmatrix}1&2\\0&1\end{pmatrix}",
        ),
        ("p=5,q=2;p=7,q=2", "(5,2),(7,2)"),
    ]);
    different(&[
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2]", "(1,2)"),
        (r"[-\infty,2)", r"(-\infty,2)"),
        (r"(0,1)\cup(2,3]", r"(0,1)\cap(2,3]"),
        (r"(0,1)\cup(2,3]", "(0,1)"),
        ("(3,1)", r"\{1,3\}"),
        ("-1,-1,1,1", "1,-1,1,1"),
        ("1,2", "1,3"),
        (r"\pm 2021", "2021"),
        ("6", r"6 \text{ or } 7"),
        (
            r"\begin{pmatrix}1&2\end{pmatrix}",
            r"\begin{pmatrix}1\\2\end{pmatrix}",
        ),
        (
            r"\begin{pmatrix}1&0\\0&1\end{pmatrix}",
            r"\begin{vmatrix}1&0\\0&1\end{vmatrix}",
        ),
    ]);
}

#[test]
fn text_and_choices() {
    same(&[
        (r"\text{(B)}", "B"),
        ("B.", r"\mathrm{(B)}"),
        (r"\text{no solution}", "No solution."),
        (r"\text{Evelyn}", "evelyn"),
        (r"\{x \mid x \geq 0\}", r"\left\{x\mid x\ge 0\right\}"),
        (r"\{x \mid x \geq 0\}", r"(\{x \mid x \geq 0\})"),
        (
            "shade: 3 of 8, sun: 5 of 8",
            "y=shade: 3 of 8, y=sun: 5 of 8",
        ),
        (
            "concave up on (0, \\infty)",
            r"concave up on \left(0,\infty\right)",
        ),
        ("$5$", r"\boxed{5}"),
        ("9", r"Therefore the value is \(9\)"),
    ]);
    different(&[
        ("A", "B"),
        ("No solution", "No solutions"),
        ("Not a function", "Not a functions"),
        ("converges", "diverges"),
        (r"\text{odd}", "dod"),
        ("62", "The answer of"),
    ]);
}

#[test]
fn wide_notation_reads_more() {
    let pairs = [
        (r"2\sqrt{5}", "2√5"),
        (r"30^\circ", "30°"),
        (r"\frac{\pi}{6}", "pi/6"),
        (r"(0,\infty)", "(0,∞)"),
        (r"\frac12", "½"),
        ("-3", "–3"),
        ("x^2", "x**2"),
        ("7/2", "3 1/2"),
        ("[2,12)", r"\big[2,12\big)"),
        (r"\frac{1}{2}x", "1/2 x"),
        // An interval without a name could be a point.
        ("2<x<5", "(2,5)"),
        ("x>3", r"(3,\infty)"),
        (r"x<-1 \text{ or } x \geq 2", r"(-\infty,-1)\cup[2,\infty)"),
        // The set of all x with a property is text to the others.
        (r"\{x \mid x < 0\}", r"\{x \mid x \lt 0\}"),
        (
            r"They do not commute at all.",
            r"\mathrm{They do not commute at all.}",
        ),
    ];
    check(Notation::Wide, true, &pairs);
    check(Notation::Standard, false, &pairs);
}

#[test]
fn the_strict_notation_leaves_unread_what_the_others_do() {
    let pairs = [
        ("3:15 \\text{ a.m.}", r"\text{3:15 a.m.}"),
        ("(0,4]", "(0; 4]"),
        (r"\{1\}\cup(2,3)", r"\{1\}\bigcup(2,3)"),
        ("x=(0,1)\\cup(2,3)", "x=(0,1) U (2,3)"),
        ("12", r"12~\mathrm{kg}"),
        (r"12\text{ units}", r"12\text{ units}\\"),
        (r"12 \mathrm{~m}", r"12 \mathrm{~m} \quad"),
        (
            r"12 \mathrm{~m} / \mathrm{s}",
            r"\frac{2(12 \mathrm{~m} / \mathrm{s})}{2}",
        ),
        (r"12 \mathrm{~m}", r"12 \mathrm{~m} \approx 12.000"),
        (r"\frac{a+1}{b}", r"{a+1 \over b}"),
        (r"1-\frac{\sin 2}{3}", r"1-{\sin 2 \over 3}"),
        (r"\frac{dx}{dt}=2x", "2x"),
        (r"\{1\}\cup(2,3)", r"\{1\} \text{ or } (2,3)"),
        (r"\frac{2}{7}", r"\frac{2}{7}=0.29"),
        (r"P(red or green)=\frac{1}{3}", r"\frac{1}{3}"),
        (r"\text{red, green}", r#""red, green""#),
        (
            "The series converges for each x.",
            "THE SERIES CONVERGES FOR EACH X.",
        ),
        (
            "The series converges for 3 values.",
            "The series converges for3values.",
        ),
        (
            "The series converges for each x.",
            r"\textbf{The series converges for each x.}",
        ),
        ("bounded", "The answer is bounded"),
    ];
    check(Notation::Wide, true, &pairs);
    check(Notation::Standard, false, &pairs);
    same(&[
        (r"{\pi \over 2}", r"\frac{\pi}{2}"),
        ("(0,1)\\cup(2,3)", "(0,1) U (2,3)"),
        (r"(0,1)\cup(2,3)", r"(0,1)\bigcup(2,3)"),
        ("(0,4)", "(0; 4)"),
        ("7, 3", "7; 3"),
        (r"12\text{ inches}", "12 inches"),
        ("12", "12 stamps"),
        (
            "The series converges for each x.",
            "the series converges for each x",
        ),
    ]);
}

#[test]
fn texts_may_part_and_repeat_in_other_ways() {
    same(&[
        (r"676,\!000", r"676\text{ and }\!000"),
        (r"\log(0.01)=-2", r"2(\log(0.01))=2(-2)"),
        (r"(0,1)\cup\{2\}", r"(0,1) \text{ or } \{2\}"),
        (
            r"n<-9 or n>2:(-\infty,-9)\cup(2,\infty)",
            r"n<-9 or n>2:(-\infty,-9), (2,\infty)",
        ),
        (r"d(t)=3t, t\ge 0", "d(t)=3t, t>0"),
        (
            r"W(x)=2x, x\ge 0 They must sell 9.",
            "W(x)=2x\nx\\ge 0 They must sell 9.",
        ),
        (
            r"m=100 \times (.001)=.1. Thus it is rare.",
            "m=100 x(.001)=.1. Thus it is rare.",
        ),
        (
            "a basis is: (1,2), the rank is: 3",
            "a basis is: (1,2), the rank is: 3., a basis is: (1,2)",
        ),
    ]);
    check(Notation::Wide, true, &[(r"(0,1)\cup(2,3)", "(0,1), (2,3)")]);
    different(&[
        (r"\log(0.01)=-2", r"2(\log(0.01))=3(-2)"),
        ("0.56 = 56\\%", r"0.56 = -(56\%)"),
        ("(0,1)=(0,1)", "2((0,1))=2((0,1))"),
        (r"(0,1)\cup(2,3)", r"(0,1) \text{ or } [2,3)"),
        (r"(0,1)\cup(2,3)", r"(0,1) \text{ and } (2,4)"),
        (r"d(t)=3t, t\ge 0", r"d(t)=4t, t\ge 0"),
        (r"d(t)=3t, t\ge 0", "d(t)=3t, t<0"),
        ("t \\ge 0", "t>0"),
        (
            "a basis is: (1,2), the rank is: 3",
            "the rank is: 3, a basis is: (1,2)",
        ),
        (
            "a basis is: (1,2), the rank is: 3",
            "a basis is: (1,2), the rank is: 3, the rank is: 4",
        ),
        ("3x(2)", r"3\times(2)"),
    ]);
}

#[test]
fn hostile_answers_are_bounded() {
    let start = std::time::Instant::now();
    let long = 9_000;
    for part in [
        "{",
        "(",
        "[",
        r"\{",
        "|",
        "-",
        "+",
        "1,",
        "1;",
        "x^",
        "x_",
        r"\sqrt",
        r"\frac",
        r"\frac1",
        "!",
        "%",
        r"\sin",
        r"\text{",
        r"\begin{pmatrix}",
        r"\left(",
        "1/",
        r"\pm",
        "\0",
        "a=",
        "<",
        "2^{",
        "9",
        "9^9^",
        r"\sum_{",
        r"\boxed{",
        "e^",
        r"\cup",
        "(1,",
        "x!",
        "'",
        r"\\",
        r"\over",
        "1+1/",
        "π",
        "\u{1F600}",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        "x(",
        r"\mathrm{",
        "0.1\\overline{",
        r"\binom{9}{9}",
    ] {
        let text = part.repeat(long / part.len());
        equal(&text, "5", Notation::Wide);
        equal(&text, &(text.clone() + "1"), Notation::Standard);
        is_readable(&text);
    }
    let nested = |open: &str, close: &str, n: usize| open.repeat(n) + "1" + &close.repeat(n);
    for n in [10, 40, 60, 10_000] {
        equal(&nested("{", "}", n), "1", Notation::Standard);
        equal(
            &nested("(", ")", n),
            &nested("(", ")", n + 1),
            Notation::Standard,
        );
        equal(&nested(r"\frac{1}{", "}", n), "1", Notation::Wide);
    }
    assert!(equal(&nested("(", ")", 20), "1", Notation::Standard));
    let megabyte = "7".repeat(1_000_000);
    assert!(!equal(&megabyte, "7", Notation::Standard));
    assert!(equal(
        &megabyte,
        &format!(" {megabyte}\n"),
        Notation::Standard
    ));
    assert!(start.elapsed().as_secs_f64() < 5.0, "{:?}", start.elapsed());
}

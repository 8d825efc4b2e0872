//! A curve drawn in the terminal with braille dots, 2 × 4 to a character.

use std::fmt::Write;

/// Plots `values` against their index; not-finite ones are left out. Empty when there are
/// fewer than two.
///
/// `width` and `height` are in characters, axis labels come on top of them.
pub fn curve(title: &str, values: &[f64], width: usize, height: usize) -> String {
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    if finite().count() < 2 || width == 0 || height == 0 {
        return String::new();
    }
    let (mut low, mut high) = finite().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    if low == high {
        (low, high) = (low - 0.5, high + 0.5);
    }
    let (columns, rows) = (2 * width, 4 * height);
    let row_of = |v: f64| ((high - v) / (high - low) * (rows - 1) as f64).round() as usize;
    let mut cells = vec![0u8; width * height];
    let mut previous: Option<usize> = None;
    for column in 0..columns {
        let Some(value) = column_mean(values, column, columns) else {
            continue;
        };
        // A vertical stroke to the last point keeps a steep curve in one piece.
        let row = row_of(value);
        let from = previous.unwrap_or(row);
        let (top, bottom) = if from < row {
            (from + 1, row)
        } else {
            (row, from.max(row + 1) - 1)
        };
        for y in top..=bottom.max(top) {
            cells[y / 4 * width + column / 2] |= dot(column % 2, y % 4);
        }
        previous = Some(row);
    }
    let labels = [format!("{high:.3}"), format!("{low:.3}")];
    let margin = labels.iter().map(String::len).max().unwrap_or(0);
    let mut text = format!("{title}\n");
    for (y, line) in cells.chunks(width).enumerate() {
        let label = match y {
            0 => labels[0].as_str(),
            y if y == height - 1 => labels[1].as_str(),
            _ => "",
        };
        let _ = write!(text, "{label:>margin$} ┤");
        text.extend(line.iter().map(|&bits| braille(bits)));
        text.push('\n');
    }
    let _ = write!(text, "{:>margin$} └{}", "", "─".repeat(width));
    text
}

/// Mean of the values that fall into a column; a column between two values takes the nearest.
fn column_mean(values: &[f64], column: usize, columns: usize) -> Option<f64> {
    let n = values.len();
    let span = if n >= columns {
        column * n / columns..(column + 1) * n / columns
    } else {
        let nearest = (column * (n - 1) + (columns - 1) / 2) / (columns - 1);
        nearest..nearest + 1
    };
    let finite: Vec<f64> = values[span]
        .iter()
        .copied()
        .filter(|v| v.is_finite())
        .collect();
    (!finite.is_empty()).then(|| finite.iter().sum::<f64>() / finite.len() as f64)
}

fn braille(bits: u8) -> char {
    char::from_u32(0x2800 + u32::from(bits)).unwrap_or(' ')
}

/// The bit of a dot: Unicode numbers the left column 1-2-3-7 and the right one 4-5-6-8.
fn dot(x: usize, y: usize) -> u8 {
    [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]][x][y]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rising_line_goes_from_corner_to_corner() {
        let values: Vec<f64> = (0..8).map(f64::from).collect();
        let plot = curve("reward", &values, 4, 2);
        let lines: Vec<&str> = plot.lines().collect();
        assert_eq!(lines[0], "reward");
        assert!(lines[1].starts_with("7.000 ┤") && lines[2].starts_with("0.000 ┤"));
        let dots = |line: &str| line.chars().skip(7).collect::<Vec<char>>();
        assert_eq!(dots(lines[1]), ['⠀', '⠀', '⡠', '⠊']);
        assert_eq!(dots(lines[2]), ['⡠', '⠊', '⠀', '⠀']);
        assert_eq!(lines[3], "      └────");
    }

    #[test]
    fn odd_inputs_do_not_panic() {
        assert_eq!(curve("x", &[], 10, 3), "");
        assert_eq!(curve("x", &[1.0], 10, 3), "");
        assert_eq!(curve("x", &[f64::NAN, 1.0], 10, 3), "");
        assert!(curve("x", &[1.0, 1.0], 10, 3).contains("1.500"));
        assert!(curve("x", &[1.0, f64::NAN, -2.0, f64::INFINITY], 10, 1).contains('┤'));
        let many: Vec<f64> = (0..1000).map(|i| f64::from(i % 7)).collect();
        assert_eq!(curve("x", &many, 60, 8).lines().count(), 10);
    }
}

//! Score against number of trained parameters: curves with error bars on a logarithmic axis,
//! reference lines, a legend. As SVG, and as PNG with the font that comes with the program.

use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontTransform, register_font};

use super::axis::{self, Tick};
use crate::{Error, Result};

/// What to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    pub curves: Vec<Curve>,
    /// Horizontal lines.
    pub references: Vec<Reference>,
    /// Under the legend; may be empty.
    pub note: String,
}

/// One colour and marker.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    pub name: String,
    /// From left to right.
    pub points: Vec<Point>,
}

/// `x` above 0; `y` a share, shown in per cent; `error` half the length of the error bar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub error: Option<f64>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    pub name: String,
    pub y: f64,
}

/// Size of the drawing in units of its own.
const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 540.0;
/// The plot lies between these; the legend stands to its right.
const LEFT: f64 = 84.0;
const RIGHT: f64 = 696.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 468.0;

/// Distance between the points that two curves have at the same place.
const BESIDE: f64 = 4.0;

/// Pixels of a PNG for one unit.
const PNG_SCALE: usize = 2;
/// A PNG is drawn this many times larger and averaged, which smooths slanted lines.
const OVERSAMPLING: usize = 2;

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(34, 34, 34);
const GRID: RGBColor = RGBColor(226, 226, 226);
const FRAME: RGBColor = RGBColor(150, 150, 150);
const FAINT: RGBColor = RGBColor(90, 90, 90);
/// Okabe and Ito's palette, which colour-blind readers can tell apart.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

impl Chart {
    /// As an SVG document.
    pub fn to_svg(&self) -> Result<String> {
        let mut text = String::new();
        let size = (WIDTH as u32, HEIGHT as u32);
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        self.draw(area, 1.0)?;
        Ok(text)
    }

    /// As a PNG file of 1840 × 1080 pixels.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let scale = PNG_SCALE * OVERSAMPLING;
        let (width, height) = (WIDTH as usize * scale, HEIGHT as usize * scale);
        let mut pixels = vec![0; 3 * width * height];
        let size = (width as u32, height as u32);
        let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        self.draw(area, scale as f64)?;
        let small = shrink(&pixels, width, OVERSAMPLING);
        encode_png(
            &small,
            (width / OVERSAMPLING) as u32,
            (height / OVERSAMPLING) as u32,
        )
    }

    fn draw<B: DrawingBackend>(&self, area: DrawingArea<B, Shift>, scale: f64) -> Result<()> {
        load_font()?;
        let paper = Paper { area, scale };
        let failed = |e: DrawingAreaErrorKind<B::ErrorType>| {
            Error::Internal(format!("cannot draw a figure: {e}"))
        };
        self.draw_on(&paper).map_err(failed)?;
        paper.area.present().map_err(failed)
    }

    fn draw_on<B: DrawingBackend>(&self, paper: &Paper<B>) -> Drawn<B> {
        paper.area.fill(&WHITE)?;
        let points = || self.curves.iter().flat_map(|c| &c.points);
        let x = axis::Log::around(points().map(|p| p.x), LEFT, RIGHT);
        let heights = points().flat_map(|p| {
            let error = p.error.unwrap_or(0.0);
            [p.y - error, p.y + error]
        });
        let heights = heights.chain(self.references.iter().map(|r| r.y));
        let y = axis::Share::around(heights, BOTTOM, TOP);

        for Tick { at, label } in x.ticks() {
            paper.line(&[(at, TOP), (at, BOTTOM)], GRID, 1.0)?;
            if let Some(label) = label {
                let below = (at, BOTTOM + 9.0);
                paper.text(&label, below, 15.0, INK, HPos::Center, VPos::Top)?;
            }
        }
        for Tick { at, label } in y.ticks() {
            paper.line(&[(LEFT, at), (RIGHT, at)], GRID, 1.0)?;
            let beside = (LEFT - 9.0, at);
            let label = label.unwrap_or_default();
            paper.text(&label, beside, 15.0, INK, HPos::Right, VPos::Center)?;
        }
        let corners = [
            (LEFT, TOP),
            (RIGHT, TOP),
            (RIGHT, BOTTOM),
            (LEFT, BOTTOM),
            (LEFT, TOP),
        ];
        paper.line(&corners, FRAME, 1.0)?;
        let middle = (LEFT + RIGHT) / 2.0;
        paper.text(
            &self.title,
            (middle, 28.0),
            20.0,
            INK,
            HPos::Center,
            VPos::Center,
        )?;
        let under = (middle, BOTTOM + 40.0);
        paper.text(&self.x_label, under, 16.0, INK, HPos::Center, VPos::Center)?;
        paper.upward(&self.y_label, (22.0, (TOP + BOTTOM) / 2.0), 16.0, INK)?;

        for (i, reference) in self.references.iter().enumerate() {
            let (colour, dash) = reference_style(i);
            paper.dashed(LEFT, RIGHT, y.place(reference.y), colour, dash)?;
        }
        let mut legend = TOP + 12.0;
        for (i, curve) in self.curves.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            // Side by side, so that the error bars of curves with the same sizes do not cover
            // each other.
            let beside = BESIDE * (i as f64 - (self.curves.len() as f64 - 1.0) / 2.0);
            let at = |p: &Point| (x.place(p.x) + beside, y.place(p.y));
            for (point, error) in curve.points.iter().filter_map(|p| Some((p, p.error?))) {
                let (low, high) = (y.place(point.y - error), y.place(point.y + error));
                let (x, _) = at(point);
                paper.line(&[(x, low), (x, high)], colour, 1.5)?;
                for end in [low, high] {
                    paper.line(&[(x - 4.0, end), (x + 4.0, end)], colour, 1.5)?;
                }
            }
            let line: Vec<(f64, f64)> = curve.points.iter().map(at).collect();
            paper.line(&line, colour, 2.0)?;
            for point in line {
                paper.marker(i, point, colour)?;
            }
            let sample = [(RIGHT + 20.0, legend), (RIGHT + 48.0, legend)];
            paper.line(&sample, colour, 2.0)?;
            paper.marker(i, (RIGHT + 34.0, legend), colour)?;
            legend = paper.legend(&curve.name, legend)?;
        }
        for (i, reference) in self.references.iter().enumerate() {
            let (colour, dash) = reference_style(i);
            paper.dashed(RIGHT + 20.0, RIGHT + 48.0, legend, colour, dash)?;
            let name = format!("{} {:.1} %", reference.name, 100.0 * reference.y);
            legend = paper.legend(&name, legend)?;
        }
        for line in wrapped(&self.note, 28) {
            let at = (RIGHT + 20.0, legend);
            paper.text(&line, at, 13.0, FAINT, HPos::Left, VPos::Center)?;
            legend += 16.0;
        }
        Ok(())
    }
}

/// Dots for the first, dashes for the others.
fn reference_style(index: usize) -> (RGBColor, (f64, f64)) {
    match index {
        0 => (FAINT, (2.0, 4.0)),
        _ => (INK, (8.0, 5.0)),
    }
}

type Drawn<B, T = ()> =
    std::result::Result<T, DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// A drawing area addressed in the units of the drawing.
struct Paper<B: DrawingBackend> {
    area: DrawingArea<B, Shift>,
    scale: f64,
}

impl<B: DrawingBackend> Paper<B> {
    fn pixel(&self, (x, y): (f64, f64)) -> (i32, i32) {
        let scaled = |v: f64| (v * self.scale).round() as i32;
        (scaled(x), scaled(y))
    }

    fn width(&self, units: f64) -> u32 {
        (units * self.scale).round().max(1.0) as u32
    }

    fn line(&self, points: &[(f64, f64)], colour: RGBColor, width: f64) -> Drawn<B> {
        let points: Vec<_> = points.iter().map(|p| self.pixel(*p)).collect();
        let style = colour.stroke_width(self.width(width));
        self.area.draw(&PathElement::new(points, style))
    }

    fn dashed(
        &self,
        from: f64,
        to: f64,
        y: f64,
        colour: RGBColor,
        (on, off): (f64, f64),
    ) -> Drawn<B> {
        let mut x = from;
        while x < to {
            self.line(&[(x, y), ((x + on).min(to), y)], colour, 1.5)?;
            x += on + off;
        }
        Ok(())
    }

    /// A circle, square, triangle or diamond, so that curves can be told apart without colour.
    fn marker(&self, index: usize, (x, y): (f64, f64), colour: RGBColor) -> Drawn<B> {
        let corners: &[(f64, f64)] = match index % 4 {
            0 => {
                let circle = Circle::new(self.pixel((x, y)), self.width(4.5), colour.filled());
                return self.area.draw(&circle);
            }
            1 => &[(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)],
            2 => &[(0.0, -5.5), (5.0, 3.5), (-5.0, 3.5)],
            _ => &[(0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)],
        };
        let corners = corners.iter().map(|(dx, dy)| self.pixel((x + dx, y + dy)));
        let shape = Polygon::new(corners.collect::<Vec<_>>(), colour.filled());
        self.area.draw(&shape)
    }

    fn text(
        &self,
        text: &str,
        at: (f64, f64),
        size: f64,
        colour: RGBColor,
        h: HPos,
        v: VPos,
    ) -> Drawn<B> {
        let style = (FONT, size * self.scale).into_font().color(&colour);
        let style = style.pos(Pos::new(h, v));
        // The box that is centred has room for accents above and less below.
        let lower = match v {
            VPos::Center => 0.13 * size,
            _ => 0.0,
        };
        let at = (at.0, at.1 + lower);
        self.area
            .draw(&Text::new(text.to_owned(), self.pixel(at), style))
    }

    /// Text that reads from bottom to top, centred on `at`.
    fn upward(&self, text: &str, at: (f64, f64), size: f64, colour: RGBColor) -> Drawn<B> {
        let font = (FONT, size * self.scale).into_font();
        let style = font.transform(FontTransform::Rotate270).color(&colour);
        let style = style.pos(Pos::new(HPos::Center, VPos::Center));
        self.area
            .draw(&Text::new(text.to_owned(), self.pixel(at), style))
    }

    /// An entry beside its sample, broken at commas where it is long; gives the next one's height.
    fn legend(&self, name: &str, y: f64) -> Drawn<B, f64> {
        const LINE: f64 = 18.0;
        let mut y = y;
        for line in wrapped(name, 20) {
            let at = (RIGHT + 58.0, y);
            self.text(&line, at, 15.0, INK, HPos::Left, VPos::Center)?;
            y += LINE;
        }
        Ok(y + 8.0)
    }
}

/// Lines of at most `limit` characters where words allow it.
fn wrapped(text: &str, limit: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= limit => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn load_font() -> Result<()> {
    static LOADED: OnceLock<bool> = OnceLock::new();
    let load = || register_font(FONT, FontStyle::Normal, dejavu::sans::regular()).is_ok();
    match LOADED.get_or_init(load) {
        true => Ok(()),
        false => Err(Error::Internal("cannot read the built-in font".to_owned())),
    }
}

/// The mean of every `by` × `by` block of RGB pixels.
fn shrink(pixels: &[u8], width: usize, by: usize) -> Vec<u8> {
    let height = pixels.len() / (3 * width);
    let mut small = Vec::with_capacity(pixels.len() / (by * by));
    for y in 0..height / by {
        for x in 0..width / by {
            for channel in 0..3 {
                let block = (0..by * by).map(|i| {
                    let (row, column) = (y * by + i / by, x * by + i % by);
                    usize::from(pixels[3 * (row * width + column) + channel])
                });
                small.push((block.sum::<usize>() / (by * by)) as u8);
            }
        }
    }
    small
}

fn encode_png(pixels: &[u8], width: u32, height: u32) -> Result<Vec<u8>> {
    let failed = |e: png::EncodingError| Error::Internal(format!("cannot write a PNG: {e}"));
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(pixels).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart {
        let curve = |name: &str, shift: f64| Curve {
            name: name.to_owned(),
            points: [1.0, 13.0, 49.0, 750_000.0]
                .iter()
                .map(|&x: &f64| Point {
                    x,
                    y: 0.3 + shift + 0.04 * x.ln(),
                    error: (x > 1.0).then_some(0.02),
                })
                .collect(),
        };
        Chart {
            title: "a < b & \"c\"".to_owned(),
            x_label: "trained parameters".to_owned(),
            y_label: "accuracy".to_owned(),
            curves: vec![curve("GRPO", 0.05), curve("SFT", 0.0)],
            references: vec![Reference {
                name: "untrained".to_owned(),
                y: 0.28,
            }],
            note: String::new(),
        }
    }

    #[test]
    fn the_picture_has_its_size_and_is_not_blank() {
        let png = chart().to_png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(png))
            .read_info()
            .unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (1840, 1080));
        let blue = |p: &&[u8]| *p == [0, 114, 178];
        assert!(pixels.chunks(3).filter(blue).count() > 500, "no curve");
        // The font is there: the title's place is not empty.
        let dark = |y: usize| {
            pixels[3 * 1840 * y..3 * 1840 * (y + 1)]
                .iter()
                .any(|c| *c < 60)
        };
        assert!((40..72).any(dark), "no title");
    }

    #[test]
    fn the_drawing_names_everything_once_and_escapes() {
        let svg = chart().to_svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for text in [
            "GRPO",
            "SFT",
            "untrained 28.0 %",
            "a &lt; b &amp; &quot;c&quot;",
        ] {
            assert_eq!(svg.matches(text).count(), 1, "{text}");
        }
    }

    #[test]
    fn nothing_to_show_is_still_a_picture() {
        let empty = Chart {
            curves: vec![Curve {
                name: "GRPO".to_owned(),
                points: Vec::new(),
            }],
            references: Vec::new(),
            ..chart()
        };
        empty.to_svg().unwrap();
        empty.to_png().unwrap();
    }

    #[test]
    fn names_wrap_between_words() {
        assert_eq!(
            wrapped("full, GRPO, tiled 93.1 %", 20),
            ["full, GRPO, tiled", "93.1 %"]
        );
        assert_eq!(wrapped("", 20), [""; 0]);
    }
}

//! Pictures of charts as PNG files, with a font of their own: no system font is needed.
//!
//! [`picture`] makes the file; a [`Panel`] is one pair of axes with curves, dots, bars, arrows and a
//! heat map in it.

mod axis;
mod heat;
mod panel;

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::{register_font, FontStyle};
use png::{BitDepth, ColorType, Compression, Encoder, FilterType};

use super::Result;

pub use axis::Scale;
pub use heat::Heat;
pub use panel::{Arrows, Bars, Curve, Mark, Panel};
pub use plotters::prelude::{RGBColor, SeriesLabelPosition};

/// What is drawn on; `split_evenly((rows, columns))`, `split_vertically(y)` and
/// `split_horizontally(x)` divide it.
pub type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

const FONT: &str = "sans-serif";
const TITLE: u32 = 20;
const AXIS: u32 = 15;
const LABEL: u32 = 14;

/// Of what is known to be true: light, for the curves that are to lie on it.
pub const TRUTH: RGBColor = RGBColor(175, 175, 175);

/// Of one series after the other (Okabe & Ito, distinct for the colour-blind).
pub const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// The colour of the i-th series.
pub fn colour(i: usize) -> RGBColor {
    COLOURS[i % COLOURS.len()]
}

/// Draws a picture of (width, height) pixels and writes it.
pub fn picture(
    path: &Path,
    size: (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<()> {
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the bundled font cannot be read")?;
    let mut pixels = vec![0; size.0 as usize * size.1 as usize * 3];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        area.fill(&WHITE)?;
        draw(&area)?;
        area.present()?;
    }
    write(path, size, &pixels).map_err(|e| format!("cannot write {}: {e}", path.display()).into())
}

/// As small as PNG makes it: unfiltered, for there is much white and few colours.
fn write(path: &Path, (width, height): (u32, u32), pixels: &[u8]) -> Result<()> {
    let mut encoder = Encoder::new(BufWriter::new(File::create(path)?), width, height);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    encoder.set_compression(Compression::Best);
    encoder.set_filter(FilterType::NoFilter);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    Ok(writer.finish()?)
}

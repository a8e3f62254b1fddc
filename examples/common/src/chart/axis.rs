//! An axis: linear, or logarithmic with ticks at powers of ten or two.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// How an axis is spaced.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Scale {
    #[default]
    Linear,
    /// Logarithmic, ticks at powers of ten.
    Decades,
    /// Logarithmic, ticks at powers of two.
    Doublings,
}

impl Scale {
    fn base(self) -> Option<f64> {
        match self {
            Self::Linear => None,
            Self::Decades => Some(10.0),
            Self::Doublings => Some(2.0),
        }
    }

    /// Whether x has a place on such an axis.
    pub fn holds(self, x: f64) -> bool {
        x.is_finite() && (self == Self::Linear || x > 0.0)
    }
}

/// A range and how it is spaced.
#[derive(Clone, Debug)]
pub struct Axis {
    range: Range<f64>,
    scale: Scale,
}

impl Axis {
    pub fn new(range: Range<f64>, scale: Scale) -> Self {
        Self { range, scale }
    }

    /// Around all of the values that have a place on it, with a margin relative to their range.
    pub fn around(values: impl Iterator<Item = f64>, scale: Scale, margin: f64) -> Self {
        let held = values.filter(|x| scale.holds(*x));
        let (low, high) = held.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
            (low.min(x), high.max(x))
        });
        let range = match (low <= high, scale) {
            (false, Scale::Linear) => 0.0..1.0,
            (false, _) => 1.0..10.0,
            (true, Scale::Linear) => {
                let room = match high - low {
                    0.0 => 0.5,
                    width => margin * width,
                };
                low - room..high + room
            }
            (true, _) => {
                let room = (high / low).powf(margin).max(1.1);
                low / room..high * room
            }
        };
        Self { range, scale }
    }

    /// Where x lies between the ends, 0 to 1 inside.
    fn position(&self, x: f64) -> f64 {
        let at = |x: f64| match self.scale {
            Scale::Linear => x,
            _ => x.max(f64::MIN_POSITIVE).ln(),
        };
        let (low, high) = (at(self.range.start), at(self.range.end));
        (at(x) - low) / (high - low)
    }

    /// At most `count` multiples of 1, 2 or 5 times a power of ten.
    fn linear_ticks(&self, count: usize) -> Vec<f64> {
        let width = self.range.end - self.range.start;
        let raw = width / count.max(1) as f64;
        let power = 10f64.powf(raw.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|m| m * power);
        let step = steps.into_iter().find(|s| *s >= raw).unwrap_or(raw);
        let first = (self.range.start / step).ceil() as i64;
        let last = (self.range.end / step).floor() as i64;
        (first..=last).map(|k| k as f64 * step).collect()
    }

    /// Powers of the base, every second or third where they are many, with multiples between them
    /// where they are few.
    fn logarithmic_ticks(&self, base: f64, count: usize) -> Vec<f64> {
        let exponent = |x: f64| x.ln() / base.ln();
        let first = (exponent(self.range.start) - 1e-9).ceil() as i32;
        let last = (exponent(self.range.end) + 1e-9).floor() as i32;
        let powers = (last - first + 1).max(0) as usize;
        if base == 10.0 && powers < 3 {
            let all = (first - 1..=last).flat_map(|k| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(k)));
            let ticks: Vec<f64> = all.filter(|x| self.range.contains(x)).collect();
            return match ticks.len() {
                0 | 1 => self.linear_ticks(count / 2),
                _ => ticks,
            };
        }
        let stride = powers.div_ceil(count.max(1)).max(1);
        (first..=last)
            .step_by(stride)
            .map(|k| base.powi(k))
            .collect()
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let length = f64::from(limit.1 - limit.0);
        limit.0 + (length * self.position(*value).clamp(-10.0, 10.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let count = hint.bold_points();
        match self.scale.base() {
            None => self.linear_ticks(count),
            Some(base) => self.logarithmic_ticks(base, count),
        }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        match self.scale {
            Scale::Doublings if self.range.start < 0.5 || self.range.end > 200_000.0 => {
                format!("2{}", superscript(value.log2().round() as i32))
            }
            _ => number(*value),
        }
    }
}

/// Plain where that is short, otherwise with a power of ten.
pub fn number(x: f64) -> String {
    let size = x.abs();
    if x == 0.0 || (0.0099..99_999.5).contains(&size) {
        let text = format!("{x:.4}");
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    let power = (size.log10() + 1e-9).floor() as i32;
    let mantissa = x / 10f64.powi(power);
    let ten = format!("10{}", superscript(power));
    match (mantissa * 1e3).round() / 1e3 {
        1.0 => ten,
        mantissa => format!("{mantissa}·{ten}"),
    }
}

fn superscript(n: i32) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    let high = |c: char| c.to_digit(10).map_or('⁻', |d| DIGITS[d as usize]);
    n.to_string().chars().map(high).collect()
}

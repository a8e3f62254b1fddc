//! Pictures of the plane: fields as arrows, functions as heat, points and paths by class.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::chart::{colour, Arrows, Curve, Heat, Mark, RGBColor};
use super::{values, Result};

/// A rectangle of the plane.
#[derive(Clone, Debug)]
pub struct Window {
    pub x: Range<f64>,
    pub y: Range<f64>,
}

impl Window {
    /// Of this half width around zero.
    pub fn square(half: f64) -> Self {
        Self {
            x: -half..half,
            y: -half..half,
        }
    }

    /// Around the points `(…, 2)` of a tensor, with a margin.
    pub fn around(points: &Tensor) -> Result<Self> {
        let all = values(points)?;
        let range = |i: usize| {
            let each = all.iter().skip(i).step_by(2).filter(|x| x.is_finite());
            let (low, high) = each.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| {
                (a.min(*x), b.max(*x))
            });
            let margin = 0.1 * (high - low).max(1e-6);
            low - margin..high + margin
        };
        Ok(Self {
            x: range(0),
            y: range(1),
        })
    }

    /// The ranges of a panel.
    pub fn ranges(&self) -> [Option<Range<f64>>; 2] {
        [Some(self.x.clone()), Some(self.y.clone())]
    }

    /// The centres of n × n cells, `(n², 2)`, row by row from low y.
    fn centres(&self, n: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let at = |range: &Range<f64>, i: usize| {
            range.start + (range.end - range.start) * (i as f64 + 0.5) / n as f64
        };
        let point = |k: usize| [at(&self.x, k % n), at(&self.y, k / n)];
        let points: Vec<f64> = (0..n * n).flat_map(point).collect();
        let points = Tensor::from_vec(points, (n * n, 2), &Device::Cpu)?;
        Ok(points.to_dtype(dtype)?.to_device(device)?)
    }

    /// The field at n × n places, longest arrows as long as a cell.
    pub fn arrows(
        &self,
        n: usize,
        (dtype, device): (DType, &Device),
        field: impl Fn(&Tensor) -> Result<Tensor>,
        colour: RGBColor,
    ) -> Result<Arrows> {
        let places = self.centres(n, dtype, device)?;
        let (from, by) = (values(&places)?, values(&field(&places)?)?);
        let pairs = |x: &[f64]| x.chunks(2).map(|p| (p[0], p[1])).collect::<Vec<_>>();
        let (from, by) = (pairs(&from), pairs(&by));
        let cell = [&self.x, &self.y].map(|r| (r.end - r.start) / n as f64);
        let length = |(x, y): &(f64, f64)| (x / cell[0]).hypot(y / cell[1]);
        let longest = by.iter().map(length).fold(0.0, f64::max).max(1e-30);
        let scaled = |(x, y): (f64, f64)| (0.9 * x / longest, 0.9 * y / longest);
        Ok(Arrows {
            colour,
            arrows: from.into_iter().zip(by.into_iter().map(scaled)).collect(),
        })
    }

    /// A function at n × n places.
    pub fn heat(
        &self,
        n: usize,
        (dtype, device): (DType, &Device),
        function: impl Fn(&Tensor) -> Result<Tensor>,
        name: &str,
    ) -> Result<Heat> {
        let all = values(&function(&self.centres(n, dtype, device)?)?)?;
        Ok(Heat {
            x: self.x.clone(),
            y: self.y.clone(),
            values: all.chunks(n).map(<[f64]>::to_vec).collect(),
            name: name.to_owned(),
            limits: None,
            numbers: false,
        })
    }
}

/// The points `(rows, 2)` as dots in the colours of their classes.
pub fn dots(points: &Tensor, classes: &[u32], names: bool) -> Result<Vec<Curve>> {
    let all = values(points)?;
    let columns = points.dim(1)?;
    let most = classes.iter().max().map_or(0, |c| *c as usize + 1);
    let of = |class: usize| {
        let rows = all.chunks(columns).zip(classes);
        let own = rows.filter(move |(_, c)| **c as usize == class);
        let name = match names {
            true => format!("class {class}"),
            false => String::new(),
        };
        Curve::new(name, colour(class), own.map(|(p, _)| (p[0], p[1]))).mark(Mark::Dots(2))
    };
    Ok((0..most).map(of).collect())
}

/// The paths of states `(times, rows, 2 or more)` in the plane of the first two, in the colours of their classes.
pub fn paths(states: &Tensor, classes: &[u32]) -> Result<Vec<Curve>> {
    let (times, rows, columns) = states.dims3()?;
    let all = values(states)?;
    let path = |row: usize| {
        let at = |time: usize| {
            let from = (time * rows + row) * columns;
            (all[from], all[from + 1])
        };
        Curve::new("", colour(classes[row] as usize), (0..times).map(at))
    };
    Ok((0..rows).map(path).collect())
}

/// One coordinate of states `(times, rows, features)` over time, a curve for each row.
pub fn over_time(
    times: &[f64],
    states: &Tensor,
    coordinate: usize,
    classes: &[u32],
) -> Result<Vec<Curve>> {
    let (_, rows, columns) = states.dims3()?;
    let all = values(states)?;
    let curve = |row: usize| {
        let at = |(i, t): (usize, &f64)| (*t, all[(i * rows + row) * columns + coordinate]);
        let points: Vec<_> = times.iter().enumerate().map(at).collect();
        Curve::new("", colour(classes[row] as usize), points)
    };
    Ok((0..rows).map(curve).collect())
}

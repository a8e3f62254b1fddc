//! Norms of an error relative to a tolerance, and of rows, for adaptive steps.  Squares are summed in f64: those of
//! f32 overflow.

use candle_core::{DType, Tensor, WithDType, D};

use super::note_host_read;
use crate::adaptive::{Measured, OfLeaf};
use crate::error::Result;
use crate::simd::pieces::by_piece;

/// The error estimate of one tensor of the state, and what it is compared with.
pub(crate) struct Estimated<'a> {
    pub(crate) error: &'a Tensor,
    /// The state at both ends of the step.
    pub(crate) y: [&'a Tensor; 2],
    pub(crate) rtol: &'a OfLeaf,
    pub(crate) atol: &'a OfLeaf,
    /// What is added to the tolerance of each row; nothing where it is empty.
    pub(crate) floor: Option<Tensor>,
    pub(crate) apart: Option<Apart<'a>>,
}

/// How far stages of an attempt are apart.
pub(crate) struct Apart<'a> {
    /// h Σ d_i k_i and Σ d_i Y_i.
    pub(crate) stages: [&'a Tensor; 2],
    /// What rounding makes of a stage, by row.
    pub(crate) rounding: Tensor,
}

/// Rows and features of a row: a vector is one row.
pub(crate) fn rows_of(x: &Tensor) -> (usize, usize) {
    let rows = if x.rank() > 1 { x.dims()[0] } else { 1 };
    (rows, x.elem_count() / rows.max(1))
}

/// RMS(max(|x|, least)) of every row, in f64, on the device of x; zero of a row without features.
pub(crate) fn row_rms(x: &Tensor, least: f64) -> Result<Tensor> {
    let (rows, features) = rows_of(x);
    if features == 0 {
        return Ok(Tensor::zeros(rows, DType::F64, x.device())?);
    }
    if x.device().is_cpu() {
        let rms = match x.dtype() {
            DType::F64 => row_rms_of::<f64>(x, features, least)?,
            _ => row_rms_of::<f32>(&x.to_dtype(DType::F32)?, features, least)?,
        };
        return Ok(Tensor::from_vec(rms, rows, x.device())?);
    }
    let x = x.detach().reshape((rows, features))?.to_dtype(DType::F64)?;
    // `Tensor::maximum` is generic, and would be compiled here again for every dtype.
    let least = Tensor::new(least, x.device())?;
    let larger = x.abs()?.broadcast_maximum(&least)?;
    Ok(larger.sqr()?.mean(D::Minus1)?.sqrt()?)
}

/// The largest norm of the tensors, with the floor and without: the RMS of a tensor or, if `worst_row` says so, of a
/// row.  Infinite where an error or a state is not finite.  The stiffness is that of all rows together.
pub(crate) fn measured(all: &[Estimated<'_>], worst_row: bool) -> Result<Measured> {
    let on_cpu = all.iter().all(|e| e.error.device().is_cpu());
    let mut apart = [0.0; 3];
    if on_cpu {
        let mut norms = [0.0f64; 2];
        for estimated in all {
            let (squares, distances) = match estimated.error.dtype() {
                DType::F64 => (squares::<f64>(estimated)?, distances::<f64>(estimated)?),
                _ => (squares::<f32>(estimated)?, distances::<f32>(estimated)?),
            };
            apart = std::array::from_fn(|i| apart[i] + distances[i]);
            let (_, features) = rows_of(estimated.error);
            let (count, of_rows) = match worst_row {
                true => (features, squares.iter().fold([0.0; 2], larger)),
                false => (
                    features * squares.len(),
                    squares
                        .iter()
                        .fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]),
                ),
            };
            norms = larger(norms, &of_rows.map(|s| (s / count.max(1) as f64).sqrt()));
        }
        return Ok(Measured::new(norms.map(finite), apart));
    }
    let each: Vec<_> = all
        .iter()
        .map(|e| chained(e, worst_row))
        .collect::<Result<_>>()?;
    note_host_read(all[0].error.device());
    let leaves = Tensor::stack(&each, 0)?.to_vec2::<f64>()?;
    let norms = leaves
        .iter()
        .fold([0.0; 2], |a, b| larger(a, &[b[0], b[1]]));
    for leaf in &leaves {
        for (sum, square) in apart.iter_mut().zip(&leaf[2..]) {
            *sum += square;
        }
    }
    Ok(Measured::new(norms.map(finite), apart))
}

/// The larger of each; NaN where one is.
fn larger(a: [f64; 2], b: &[f64; 2]) -> [f64; 2] {
    let larger = |a: f64, b: f64| if a >= b || a.is_nan() { a } else { b };
    [larger(a[0], b[0]), larger(a[1], b[1])]
}

fn finite(norm: f64) -> f64 {
    if norm.is_finite() {
        norm
    } else {
        f64::INFINITY
    }
}

/// The squares of the error, summed by row, with the floor and without.
fn squares<T: Number>(estimated: &Estimated<'_>) -> Result<Vec<[f64; 2]>> {
    let (rows, features) = rows_of(estimated.error);
    let [y0, y1] = estimated.y;
    let floor = by_row(estimated.floor.as_ref(), rows)?;
    with(&[estimated.error, y0, y1], |operands: [&[T]; 3]| {
        let [error, y0, y1] = operands;
        tolerances(estimated.rtol, |rtol: Values<'_, T>| {
            tolerances(estimated.atol, |atol: Values<'_, T>| {
                let row = |row: usize| {
                    let at = row * features;
                    let mut sums = [0.0; 2];
                    for i in at..at + features {
                        let (a, b) = (y0[i].wide().abs(), y1[i].wide().abs());
                        let tolerance = atol.get(i) + rtol.get(i) * if a > b { a } else { b };
                        let error = error[i].wide();
                        if !b.is_finite() {
                            sums = [f64::INFINITY; 2];
                        } else if error != 0.0 {
                            let with_floor = error / (tolerance + floor[row]);
                            let plain = error / tolerance;
                            sums[0] += with_floor * with_floor;
                            sums[1] += plain * plain;
                        }
                    }
                    sums
                };
                sums_of_rows([rows, features], row)
            })
        })?
    })?
}

/// Mean squares relative to the tolerance of the distances between stages, and of rounding.
fn distances<T: Number>(estimated: &Estimated<'_>) -> Result<[f64; 3]> {
    let Some(Apart { stages, rounding }) = &estimated.apart else {
        return Ok([0.0; 3]);
    };
    let (rows, features) = rows_of(estimated.error);
    let [y0, y1] = estimated.y;
    let floor = by_row(estimated.floor.as_ref(), rows)?;
    let rounding = by_row(Some(rounding), rows)?;
    let sums = with(&[stages[0], stages[1], y0, y1], |operands: [&[T]; 4]| {
        let [moved, apart, y0, y1] = operands;
        tolerances(estimated.rtol, |rtol: Values<'_, T>| {
            tolerances(estimated.atol, |atol: Values<'_, T>| {
                let row = |row: usize| {
                    let at = row * features;
                    let mut sums = [0.0; 3];
                    for i in at..at + features {
                        let size = y0[i].wide().abs().max(y1[i].wide().abs());
                        let scale = atol.get(i) + rtol.get(i) * size + floor[row];
                        // What has no tolerance is not compared.
                        let weight = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                        let of = [moved[i].wide(), apart[i].wide(), rounding[row]];
                        for (sum, x) in sums.iter_mut().zip(of) {
                            *sum += (x * weight) * (x * weight);
                        }
                    }
                    sums
                };
                sums_of_rows([rows, features], row)
            })
        })?
    })??;
    let count = (rows * features).max(1) as f64;
    let total = sums.iter().fold([0.0; 3], |a: [f64; 3], b| {
        std::array::from_fn(|i| a[i] + b[i])
    });
    Ok(total.map(|sum| sum / count))
}

/// A number of every row; zero where there is none.
fn by_row(numbers: Option<&Tensor>, rows: usize) -> Result<Vec<f64>> {
    match numbers {
        Some(numbers) => Ok(numbers.to_vec1::<f64>()?),
        None => Ok(vec![0.0; rows]),
    }
}

/// The sums of every row, on several threads if there are many numbers.
fn sums_of_rows<const N: usize>(
    [rows, features]: [usize; 2],
    row: impl Fn(usize) -> [f64; N] + Sync,
) -> Vec<[f64; N]> {
    const SMALL: usize = 1 << 15;
    let mut sums = vec![[0.0; N]; rows];
    by_piece(&mut sums, (SMALL / features.max(1)).max(1), &|at, sums| {
        for (i, sums) in (at..).zip(sums) {
            *sums = row(i);
        }
    });
    sums
}

/// The same in candle's operations, reduced to five numbers on the device.
fn chained(estimated: &Estimated<'_>, worst_row: bool) -> Result<Tensor> {
    let (rows, features) = rows_of(estimated.error);
    let wide = |x: &Tensor| x.detach().reshape((rows, features))?.to_dtype(DType::F64);
    let tolerance = |tolerance: &OfLeaf, y: &Tensor| match tolerance {
        OfLeaf::Number(value) => y.zeros_like()? + *value,
        OfLeaf::Elements(x) => wide(x),
    };
    let [y0, y1] = estimated.y;
    let (error, y1) = (wide(estimated.error)?, wide(y1)?);
    let largest = wide(y0)?.abs()?.broadcast_maximum(&y1.abs()?)?;
    let rtol = tolerance(estimated.rtol, &largest)?;
    let plain = ((rtol * largest)? + tolerance(estimated.atol, &error)?)?;
    let floored = match &estimated.floor {
        Some(floor) => plain.broadcast_add(&floor.reshape((rows, 1))?)?,
        None => plain.clone(),
    };
    // An error of zero needs no tolerance; a state that is not finite must be seen in any case.
    let bad = (&y1 * 0.0)?;
    let none = error.eq(0.0)?;
    let distances = match &estimated.apart {
        Some(Apart { stages, rounding }) => {
            let rounding = floored
                .zeros_like()?
                .broadcast_add(&rounding.reshape((rows, 1))?)?;
            let of = [wide(stages[0])?, wide(stages[1])?, rounding];
            // What has no tolerance is not compared.
            let is_scaled = floored.gt(0.0)?;
            let mean = |x: &Tensor| {
                let ratio = (x / &floored)?;
                is_scaled
                    .where_cond(&ratio, &ratio.zeros_like()?)?
                    .sqr()?
                    .mean_all()
            };
            of.iter()
                .map(mean)
                .collect::<candle_core::Result<Vec<_>>>()?
        }
        None => vec![Tensor::zeros((), DType::F64, plain.device())?; 3],
    };
    let each = [floored, plain].map(|scale| -> candle_core::Result<Tensor> {
        let ratio = none.where_cond(&bad, &((&error / scale)? + &bad)?)?;
        match worst_row {
            true => {
                let rows = ratio.sqr()?.mean(D::Minus1)?;
                // A maximum may skip NaN, a sum does not.
                (rows.max(0)? + (&rows * 0.0)?.sum(0)?)?.sqrt()
            }
            false => ratio.sqr()?.mean_all()?.sqrt(),
        }
    });
    let [floored, plain] = each;
    Ok(Tensor::stack(
        &[&[floored?, plain?], &distances[..]].concat(),
        0,
    )?)
}

/// f32 or f64.
trait Number: WithDType + Copy + Send + Sync {
    fn wide(self) -> f64;
}

impl Number for f32 {
    fn wide(self) -> f64 {
        self.into()
    }
}

impl Number for f64 {
    fn wide(self) -> f64 {
        self
    }
}

/// A tolerance of every element.
#[derive(Clone, Copy)]
enum Values<'a, T> {
    Number(f64),
    Elements(&'a [T]),
}

impl<T: Number> Values<'_, T> {
    #[inline(always)]
    fn get(&self, i: usize) -> f64 {
        match self {
            Self::Number(value) => *value,
            Self::Elements(x) => x[i].wide(),
        }
    }
}

fn tolerances<T: Number, R>(
    tolerance: &OfLeaf,
    then: impl FnOnce(Values<'_, T>) -> R,
) -> Result<R> {
    match tolerance {
        OfLeaf::Number(value) => Ok(then(Values::Number(*value))),
        OfLeaf::Elements(x) => with(&[x], |[x]: [&[T]; 1]| then(Values::Elements(x))),
    }
}

fn row_rms_of<T: Number>(x: &Tensor, features: usize, least: f64) -> Result<Vec<f64>> {
    with(&[x], |[x]: [&[T]; 1]| {
        let rms = |row: &[T]| {
            let squares = row.iter().map(|x| {
                let x = x.wide().abs();
                let x = if x < least { least } else { x };
                x * x
            });
            (squares.sum::<f64>() / features as f64).sqrt()
        };
        x.chunks(features.max(1)).map(rms).collect()
    })
}

/// The numbers of tensors on the CPU.
fn with<T: WithDType, R, const N: usize>(
    tensors: &[&Tensor; N],
    then: impl FnOnce([&[T]; N]) -> R,
) -> Result<R> {
    let contiguous: Vec<_> = tensors
        .iter()
        .map(|x| x.contiguous())
        .collect::<candle_core::Result<_>>()?;
    let guards: Vec<_> = contiguous.iter().map(Tensor::storage_and_layout).collect();
    let mut slices: [&[T]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let candle_core::Storage::Cpu(storage) = &**storage else {
            return Err(candle_core::Error::Msg("not on the CPU".into()).into());
        };
        let (start, end) = layout.contiguous_offsets().unwrap_or((0, 0));
        *slice = storage.as_slice::<T>()?.get(start..end).unwrap_or(&[]);
    }
    Ok(then(slices))
}

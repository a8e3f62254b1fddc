//! Inverses of the small matrices of every row, on the host, in f64.

/// Why a matrix has no inverse: the smallest pivot of the matrix with rows and columns scaled to largest entries of 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Singular(pub(super) f64);

/// The inverse of a symmetric n × n matrix, `[row][column]`, by Gauss–Jordan elimination with partial pivoting: it may be
/// indefinite.  Rows and columns are scaled first, so that units of coordinates do not matter: pivots below `least` count as
/// zero.  NaN gives NaN.
pub(super) fn inverse(matrix: &[f64], n: usize, least: f64) -> Result<Vec<f64>, Singular> {
    let scales = scales(matrix, n);
    let scaled = |k: usize| matrix[k] * scales[k / n] * scales[k % n];
    let scaled: Vec<f64> = (0..n * n).map(scaled).collect();
    let inverse = inverse_of_scaled(&scaled, n, least)?;
    let back = |k: usize| inverse[k] * scales[k / n] * scales[k % n];
    Ok((0..n * n).map(back).collect())
}

/// Factors s of coordinates, powers of two, for which the largest entries of the rows of s_i M_ij s_j are close to 1.
fn scales(matrix: &[f64], n: usize) -> Vec<f64> {
    let mut scales = vec![1.0; n];
    // Each round halves the logarithm of what the largest entries differ from 1 by.
    for _ in 0..8 {
        let largest = |i: usize| {
            let row = (0..n).map(|j| (matrix[i * n + j] * scales[i] * scales[j]).abs());
            row.fold(0.0, f64::max)
        };
        let factors: Vec<f64> = (0..n)
            .map(|i| match largest(i) {
                x if x > 0.0 && x.is_finite() => (-0.5 * x.log2()).round().exp2(),
                _ => 1.0,
            })
            .collect();
        for (scale, factor) in scales.iter_mut().zip(factors) {
            *scale *= factor;
        }
    }
    scales
}

fn inverse_of_scaled(matrix: &[f64], n: usize, least: f64) -> Result<Vec<f64>, Singular> {
    let width = 2 * n;
    // [M | 1].
    let mut a = vec![0.0; n * width];
    for i in 0..n {
        a[i * width..][..n].copy_from_slice(&matrix[i * n..][..n]);
        a[i * width + n + i] = 1.0;
    }
    for column in 0..n {
        let size = |row: &usize| a[row * width + column].abs();
        let pivot = (column..n).max_by(|i, j| size(i).total_cmp(&size(j)));
        let pivot = pivot.unwrap_or(column);
        let value = a[pivot * width + column];
        if value.abs() <= least {
            return Err(Singular(value.abs()));
        }
        for k in 0..width {
            a.swap(pivot * width + k, column * width + k);
        }
        for k in 0..width {
            a[column * width + k] /= value;
        }
        for row in (0..n).filter(|row| *row != column) {
            let factor = a[row * width + column];
            for k in 0..width {
                a[row * width + k] -= factor * a[column * width + k];
            }
        }
    }
    let row = |i: usize| a[i * width + n..][..n].to_vec();
    Ok((0..n).flat_map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_times_its_inverse_is_one() {
        for n in 1..6 {
            // Sines of squares: those of multiples would be of rank two.
            let entry = |i: usize| (12.9898 * ((i + 1) * (i + 1)) as f64).sin();
            let matrix: Vec<f64> = (0..n * n).map(entry).collect();
            let inverse = inverse(&matrix, n, 1e-14).unwrap();
            for i in 0..n {
                for j in 0..n {
                    let sum: f64 = (0..n).map(|k| matrix[i * n + k] * inverse[k * n + j]).sum();
                    assert!((sum - f64::from(u8::from(i == j))).abs() < 1e-12, "{n}");
                }
            }
        }
    }

    #[test]
    fn units_of_coordinates_do_not_make_a_matrix_singular() {
        // In the unit roundoff of f32, of a mass beside an inertia.
        let least = 2.0 * 2f64.powi(-24);
        let got = inverse(&[1.0, 0.0, 0.0, 1e-8], 2, least).unwrap();
        assert!((got[3] * 1e-8 - 1.0).abs() < 1e-12 && got[0] == 1.0 && got[1] == 0.0);
        let coupled = [4.0, 1e-4, 1e-4, 1e-8];
        let got = inverse(&coupled, 2, least).unwrap();
        let product = coupled[2] * got[1] + coupled[3] * got[3];
        assert!((product - 1.0).abs() < 1e-12, "{product}");
        // And they do not hide that one is.
        assert!(inverse(&[1.0, 1e-4, 1e-4, 1e-8], 2, least).is_err());
    }

    #[test]
    fn a_singular_matrix_is_refused_and_an_indefinite_one_is_not() {
        assert_eq!(inverse(&[1.0, 2.0, 2.0, 4.0], 2, 1e-12), Err(Singular(0.0)));
        assert_eq!(inverse(&[0.0], 1, 1e-12), Err(Singular(0.0)));
        assert_eq!(
            inverse(&[0.0, 1.0, 1.0, 0.0], 2, 1e-12),
            Ok(vec![0.0, 1.0, 1.0, 0.0])
        );
        assert!(inverse(&[f64::NAN], 1, 1e-12).unwrap()[0].is_nan());
    }
}

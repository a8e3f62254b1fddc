//! Inverses of the small matrices of every row, on the host, in f64.

/// Why a matrix has no inverse: the smallest pivot over its largest entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Singular(pub(super) f64);

/// The inverse of an n × n matrix, `[row][column]`, by Gauss–Jordan elimination with partial pivoting: it may be
/// indefinite.  Pivots below `least` times the largest entry count as zero; NaN gives NaN.
pub(super) fn inverse(matrix: &[f64], n: usize, least: f64) -> Result<Vec<f64>, Singular> {
    let largest = matrix.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
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
        if value.abs() <= least * largest {
            let ratio = if largest > 0.0 {
                value.abs() / largest
            } else {
                0.0
            };
            return Err(Singular(ratio));
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

//! Stream lines of a plane vector field, evenly spread (after Jobard & Lefer, 1997).

use common::Result;

/// A square of the plane, from low to high in both directions.
pub(crate) type Square = [f64; 2];
type Point = (f64, f64);

/// Cells along a side: no two lines run through one cell.
const CELLS: usize = 26;
/// Length of a step, in cells.
const STEP: f64 = 0.2;
const STEPS: usize = 600;
/// Lines shorter than this, in cells, are left out.
const SHORTEST: f64 = 2.0;

/// The lines of `velocity` in the square, along it and against it from seeds at the cells.
pub(crate) fn lines(
    square: Square,
    velocity: impl Fn(Point) -> Result<Point>,
) -> Result<Vec<Vec<Point>>> {
    let side = (square[1] - square[0]) / CELLS as f64;
    let mut taken = vec![false; CELLS * CELLS];
    let mut lines = vec![];
    // Seeds from the border inwards leave the long lines whole.
    let mut seeds: Vec<usize> = (0..CELLS * CELLS).collect();
    let border = |n: &usize| {
        let (i, j) = (n / CELLS, n % CELLS);
        i.min(j).min(CELLS - 1 - i).min(CELLS - 1 - j)
    };
    seeds.sort_by_key(border);
    for seed in seeds {
        if taken[seed] {
            continue;
        }
        let middle = |i: usize| square[0] + side * (i as f64 + 0.5);
        let start = (middle(seed % CELLS), middle(seed / CELLS));
        let mut own = vec![seed];
        let back = half(square, -STEP * side, start, &velocity, &taken, &mut own)?;
        let there = half(square, STEP * side, start, &velocity, &taken, &mut own)?;
        let line: Vec<Point> = back.into_iter().rev().chain([start]).chain(there).collect();
        if line.len() as f64 * STEP >= SHORTEST {
            own.into_iter().for_each(|cell| taken[cell] = true);
            lines.push(line);
        }
    }
    Ok(lines)
}

/// The cell of a point, if it is in the square.
fn cell(square: Square, (x, y): Point) -> Option<usize> {
    let index = |x: f64| {
        let i = (x - square[0]) / (square[1] - square[0]) * CELLS as f64;
        (i >= 0.0 && i < CELLS as f64).then_some(i as usize)
    };
    Some(index(y)? * CELLS + index(x)?)
}

/// Follows the direction of the velocity by the midpoint rule, until the line leaves the square, comes
/// to a cell of another line or back to its own.
fn half(
    square: Square,
    step: f64,
    start: Point,
    velocity: &impl Fn(Point) -> Result<Point>,
    taken: &[bool],
    own: &mut Vec<usize>,
) -> Result<Vec<Point>> {
    let (mut at, mut line) = (start, vec![]);
    let mut last = own.first().copied();
    for _ in 0..STEPS {
        let Some(middle) = along(at, step / 2.0, velocity(at)?) else {
            break;
        };
        let Some(next) = along(at, step, velocity(middle)?) else {
            break;
        };
        let Some(now) = cell(square, next) else { break };
        if Some(now) != last {
            if taken[now] || own.contains(&now) {
                break;
            }
            own.push(now);
            last = Some(now);
        }
        line.push(next);
        at = next;
    }
    Ok(line)
}

/// From `at` by `step` in the direction of a velocity.
fn along(at: Point, step: f64, (vx, vy): Point) -> Option<Point> {
    let speed = vx.hypot(vy);
    let moves = speed.is_finite() && speed > 0.0;
    moves.then(|| (at.0 + step * vx / speed, at.1 + step * vy / speed))
}

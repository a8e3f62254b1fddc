//! A field as a list of operations on matrices, `(rows, features)`: what the reference evaluates and pulls
//! back, and what closures are made of.

use candle_diffeq::nn::Activation;

/// One operation; operands are positions of operations before it.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// A tensor of the state.
    State(usize),
    Param(usize),
    /// `(1, 1)`.
    Time,
    /// Column j of a parameter as a row.
    Column {
        p: usize,
        j: usize,
    },
    /// x Wᵀ + b of parameters w and b.
    Affine {
        x: usize,
        w: usize,
        b: Option<usize>,
    },
    /// A derivative of the activation.
    Act {
        x: usize,
        activation: Activation,
        order: usize,
    },
    /// Shapes agree, or one of them has one row or one column.
    Add(usize, usize),
    Mul(usize, usize),
    Scale(usize, f64),
    /// Over the features: `(rows, 1)`.
    SumCols(usize),
    /// Over the rows: `(1, features)`.
    MeanRows(usize),
    Concat(usize, usize),
    Slice {
        x: usize,
        from: usize,
        n: usize,
    },
    /// Images of `(channels, height, width)` in a row.
    Conv {
        x: usize,
        w: usize,
        b: usize,
        image: Image,
    },
    /// Over groups of neighbouring features: `(rows, groups)`.
    GroupMean {
        x: usize,
        groups: usize,
    },
    /// Every feature so many times.
    Spread {
        x: usize,
        times: usize,
    },
    /// 1/√(x + ε).
    RSqrt {
        x: usize,
        epsilon: f64,
    },
}

/// The geometry of a convolution that keeps the size of its image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Image {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) size: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
}

impl Image {
    /// Every product of the convolution of one image: (output, input, tap).
    pub(crate) fn taps(self, mut see: impl FnMut(usize, usize, usize)) {
        let (height, width, half) = (self.height, self.width, self.size / 2);
        for (o, i) in (0..self.outputs).flat_map(|o| (0..self.inputs).map(move |i| (o, i))) {
            for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
                for (a, b) in (0..self.size).flat_map(|a| (0..self.size).map(move |b| (a, b))) {
                    let (Some(v), Some(u)) = ((y + a).checked_sub(half), (x + b).checked_sub(half))
                    else {
                        continue;
                    };
                    if v < height && u < width {
                        let output = (o * height + y) * width + x;
                        let input = (i * height + v) * width + u;
                        let tap = ((o * self.inputs + i) * self.size + a) * self.size + b;
                        see(output, input, tap);
                    }
                }
            }
        }
    }
}

/// A parameter: its name for a `VarBuilder`, its shape there, and as a matrix.
#[derive(Clone, Debug)]
pub(crate) struct Param {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Values are drawn from centre ± spread.
    pub(crate) centre: f64,
    pub(crate) spread: f64,
}

/// f(t, y): one output for each tensor of the state.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    /// Rows and features of the state's tensors.
    pub(crate) leaves: Vec<(usize, usize)>,
    pub(crate) params: Vec<Param>,
    pub(crate) ops: Vec<Op>,
    /// Shape of every operation's result.
    pub(crate) shapes: Vec<(usize, usize)>,
    pub(crate) outputs: Vec<usize>,
}

impl Program {
    pub(crate) fn param(
        &mut self,
        name: String,
        shape: &[usize],
        centre: f64,
        spread: f64,
    ) -> usize {
        let (rows, cols) = match shape {
            [] => (1, 1),
            [n] => (1, *n),
            [n, rest @ ..] => (*n, rest.iter().product()),
        };
        self.params.push(Param {
            name,
            shape: shape.to_vec(),
            rows,
            cols,
            centre,
            spread,
        });
        self.params.len() - 1
    }

    /// Appends an operation; its position.
    pub(crate) fn push(&mut self, op: Op) -> usize {
        let of = |i: usize| self.shapes[i];
        let wider = |a: usize, b: usize| (of(a).0.max(of(b).0), of(a).1.max(of(b).1));
        let shape = match op {
            Op::State(leaf) => self.leaves[leaf],
            Op::Param(p) => (self.params[p].rows, self.params[p].cols),
            Op::Time => (1, 1),
            Op::Column { p, .. } => (1, self.params[p].rows),
            Op::Affine { x, w, .. } => (of(x).0, self.params[w].rows),
            Op::Act { x, .. } | Op::Scale(x, _) | Op::RSqrt { x, .. } => of(x),
            Op::Add(a, b) | Op::Mul(a, b) => wider(a, b),
            Op::SumCols(x) => (of(x).0, 1),
            Op::MeanRows(x) => (1, of(x).1),
            Op::Concat(a, b) => (of(a).0.max(of(b).0), of(a).1 + of(b).1),
            Op::Slice { x, n, .. } => (of(x).0, n),
            Op::Conv { x, image, .. } => (of(x).0, image.outputs * image.height * image.width),
            Op::GroupMean { x, groups } => (of(x).0, groups),
            Op::Spread { x, times } => (of(x).0, of(x).1 * times),
        };
        self.ops.push(op);
        self.shapes.push(shape);
        self.ops.len() - 1
    }

    /// Multiply-adds of an evaluation, roughly.
    pub(crate) fn cost(&self) -> usize {
        let of = |(op, &(rows, cols)): (&Op, &(usize, usize))| match op {
            Op::Affine { w, .. } => rows * cols * self.params[*w].cols,
            Op::Conv { image, .. } => rows * cols * image.inputs * image.size * image.size,
            _ => 4 * rows * cols,
        };
        self.ops.iter().zip(&self.shapes).map(of).sum()
    }
}

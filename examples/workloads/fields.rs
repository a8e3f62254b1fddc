//! The fields of the workloads, by kind, in ordinary candle operations over weights p0, p1, ….

use candle_core::{Result, Tensor, D};
use candle_diffeq::Time;

/// A field over the parts of the state.
pub(crate) type Field = Box<dyn Fn(&Time, &Vec<Tensor>) -> Result<Vec<Tensor>> + Send + Sync>;

/// Makes a field of its weights: matrix or kernel, bias, matrix or kernel, bias, ….
pub(crate) type Build = fn(Vec<(Tensor, Tensor)>) -> Result<Field>;

/// Every kind.
pub(crate) const KINDS: [(&str, Build); 3] = [("mlp", mlp), ("conv", conv), ("cnf", cnf)];

fn affine(x: &Tensor, (weight, bias): &(Tensor, Tensor)) -> Result<Tensor> {
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}

/// Layers with tanh between them.
fn mlp(layers: Vec<(Tensor, Tensor)>) -> Result<Field> {
    Ok(Box::new(move |_, y| {
        let mut x = y[0].clone();
        for (i, layer) in layers.iter().enumerate() {
            x = affine(&if i > 0 { x.tanh()? } else { x }, layer)?;
        }
        Ok(vec![x])
    }))
}

/// Convolutions that keep the size of the image, with relu between them.
fn conv(layers: Vec<(Tensor, Tensor)>) -> Result<Field> {
    Ok(Box::new(move |_, y| {
        let mut x = y[0].clone();
        for (i, (kernel, bias)) in layers.iter().enumerate() {
            let input = if i > 0 { x.relu()? } else { x };
            let padding = kernel.dim(D::Minus1)? / 2;
            let image = input.conv2d(kernel, padding, 1, 1, 1)?;
            x = image.broadcast_add(&bias.reshape(((), 1, 1))?)?;
        }
        Ok(vec![x])
    }))
}

/// z' = `mlp`(z), (log p)' = −tr ∂z'/∂z, by one forward tangent for each coordinate of z.
fn cnf(layers: Vec<(Tensor, Tensor)>) -> Result<Field> {
    Ok(Box::new(move |_, y| {
        let (mut x, mut slopes) = (y[0].clone(), vec![]);
        for (i, layer) in layers.iter().enumerate() {
            if i > 0 {
                x = x.tanh()?;
                slopes.push((1.0 - x.sqr()?)?);
            }
            x = affine(&x, layer)?;
        }
        let mut trace = x.narrow(1, 0, 1)?.zeros_like()?;
        for i in 0..x.dim(1)? {
            // The i-th column of the Jacobian: e_i through every layer, row by row of the batch.
            let mut tangent = layers[0].0.narrow(1, i, 1)?.t()?;
            for (slope, (weight, _)) in slopes.iter().zip(&layers[1..]) {
                tangent = slope.broadcast_mul(&tangent)?.matmul(&weight.t()?)?;
            }
            trace = trace.broadcast_add(&tangent.narrow(1, i, 1)?)?;
        }
        Ok(vec![x, trace.neg()?])
    }))
}

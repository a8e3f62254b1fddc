//! What can be wrong with a potential, or with the field that is made of it.

/// Potentials that a field cannot be made of, and points at which it has no value.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PotentialDefect {
    /// An activation without curvature.
    #[error("a potential with the activation {activation}, whose second derivative is zero, has a gradient that is piecewise constant: a field made of it cannot learn, and a Lagrangian has no mass; take a smooth activation such as softplus or tanh")]
    Flat {
        /// The activation.
        activation: &'static str,
    },
    /// The outputs of a network that is to give one number.
    #[error("a potential needs a network of one output, this has {outputs}: ask for the sum of their squares, or for a last width of 1")]
    Outputs {
        /// Width of the last layer.
        outputs: usize,
    },
    /// The mass matrix ∂²L/∂q̇∂q̇ has no inverse.
    #[error("the mass matrix of row {row} at t = {t:?} is singular: with its rows and columns scaled to entries of 1, its smallest pivot is {pivot:.1e}; add a kinetic energy (Lagrangian::with_mass), or draw the initial weights larger")]
    SingularMass {
        /// Row of the batch.
        row: usize,
        /// Time of the evaluation.
        t: f64,
        /// Smallest pivot of the matrix with rows and columns scaled to largest entries of about 1.
        pivot: f64,
    },
}

//! What can be wrong with a control path, or with a field that is driven by one.

use candle_core::{DType, Shape};

/// Observations through which no control path goes, or a path that does not fit its use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PathDefect {
    /// Observations are not a batch of series.
    #[error("observations are (batch, length, channels), each at least 1, got shape {shape:?}")]
    Shape {
        /// Their shape.
        shape: Shape,
    },
    /// Observations are not floating-point numbers.
    #[error("observations are {dtype:?}; f16, bf16, f32 and f64 are possible")]
    Dtype {
        /// Their dtype.
        dtype: DType,
    },
    /// A path needs an interval.
    #[error("a path needs observations at two times at least, got {length}")]
    TooShort {
        /// Times of observation.
        length: usize,
    },
    /// Times do not belong to the observations.
    #[error("{times} times were given for series of {length} observations: give one for each")]
    Times {
        /// Times that were given.
        times: usize,
        /// Observations of a series.
        length: usize,
    },
    /// Times of observation go back.
    #[error("times of observation must increase, but go from {start} to {end}")]
    Decreasing {
        /// The first.
        start: f64,
        /// The last.
        end: f64,
    },
    /// Gradients with respect to times of observation.
    #[error("times of observation receive no gradients: give them as numbers, or detached; times that are data are a channel of the observations")]
    TimeGradients,
    /// Times of observation are equal in the dtype of the observations, in which they were to be a channel.
    #[error("the times {start} and {end} are equal in {dtype:?}: let times begin at 0, or use another unit or f64")]
    TimesCoincide {
        /// The first.
        start: f64,
        /// The second.
        end: f64,
        /// Of the observations.
        dtype: DType,
    },
    /// An observation is infinite; a missing one is NaN.
    #[error(
        "observation {index} of channel {channel} in row {row} is {value}; a missing one is NaN"
    )]
    Infinite {
        /// Index of the series in the batch.
        row: usize,
        /// Index of the time.
        index: usize,
        /// The channel.
        channel: usize,
        /// Its value.
        value: f64,
    },
    /// Lengths do not belong to the batch.
    #[error("{given} lengths were given for {rows} series: give one for each")]
    Lengths {
        /// Lengths that were given.
        given: usize,
        /// Series in the batch.
        rows: usize,
    },
    /// A series of no observation, or of more than there are.
    #[error("the length of series {row} is {length}: from 1 to {most} is possible")]
    Length {
        /// Index of the series.
        row: usize,
        /// Its length.
        length: usize,
        /// Observations of the longest possible one.
        most: usize,
    },
    /// A channel that is not there.
    #[error("channel {channel} was named as that of time, but there are {channels} channels, numbered from 0")]
    NoChannel {
        /// What was named.
        channel: usize,
        /// Channels of the observations.
        channels: usize,
    },
    /// A rectilinear path goes through every value of the channel of time.
    #[error("observation {index} of series {row} has no value in channel {channel}, which is time: a rectilinear path needs all of them")]
    TimeMissing {
        /// Index of the series.
        row: usize,
        /// Index of the observation.
        index: usize,
        /// The channel of time.
        channel: usize,
    },
    /// Windows of no interval.
    #[error("a window of 0 intervals was asked for: it needs at least 1")]
    Window,
    /// A time at which the path is not defined.
    #[error("the path is defined from {start} to {end}, not at t = {t:?}")]
    Outside {
        /// The time.
        t: f64,
        /// The first knot.
        start: f64,
        /// The last knot.
        end: f64,
    },
    /// A state that no path drives.
    #[error(
        "a driven state is (rows, hidden) with the {rows} rows of the path, got shape {got:?}"
    )]
    State {
        /// Rows of the path.
        rows: usize,
        /// Shape of the state.
        got: Shape,
    },
    /// F(t, z) cannot be multiplied by the slope of the path.
    #[error(
        "the field returned shape {got:?}, but F(t, z) is (rows, hidden, channels) = {needs:?}"
    )]
    Matrix {
        /// What F must be.
        needs: [usize; 3],
        /// Its shape.
        got: Shape,
    },
    /// The field is made for another number of channels than the path has.
    #[error("the field is driven by {needs} channels, the path has {channels}")]
    Channels {
        /// Channels of the field.
        needs: usize,
        /// Channels of the path.
        channels: usize,
    },
    /// The map from X(t_0) to z(t_0) returned something else than a state.
    #[error("the initial map returned shape {got:?} for {rows} rows; (rows, hidden) is needed")]
    Initial {
        /// Rows of the path.
        rows: usize,
        /// What it returned.
        got: Shape,
    },
    /// Tensors that are not those of a path.
    #[error("these tensors are not those of a control path: hand on all tensors of State::leaves of a ControlPath, in their order, with their shapes and dtypes")]
    NoPath,
}

//! The way of an error through candle and back.

use super::Error;

impl Error {
    /// Whether gradients overflowed, which [`OnOverflow`](crate::scaling::OnOverflow) decides about.
    pub(crate) fn is_overflow(&self) -> bool {
        matches!(
            self,
            Self::NonFiniteCotangent
                | Self::NonFiniteGradient { .. }
                | Self::NonFiniteParameterGradient
                | Self::ScaleExhausted { .. }
        )
    }

    /// Finds an error of this crate behind one of candle's, through its contexts and backtraces.
    ///
    /// ```
    /// use candle_diffeq::Error;
    /// let through_candle: candle_core::Error = Error::EmptyGrid.into();
    /// assert!(matches!(Error::from_candle(&through_candle), Some(Error::EmptyGrid)));
    /// ```
    pub fn from_candle(error: &candle_core::Error) -> Option<&Error> {
        use candle_core::Error as E;
        match error {
            E::Io(carrier) => carrier.get_ref()?.downcast_ref(),
            // candle's `Context` boxes whatever error it is given, ours as it is.
            E::WrappedContext { wrapped, .. } => match wrapped.downcast_ref::<Error>() {
                Some(Error::Candle(inner)) => Self::from_candle(inner),
                Some(error) => Some(error),
                None => wrapped
                    .downcast_ref::<candle_core::Error>()
                    .and_then(Self::from_candle),
            },
            E::WithBacktrace { inner, .. }
            | E::Context { inner, .. }
            | E::WithPath { inner, .. } => Self::from_candle(inner),
            _ => None,
        }
    }
}

/// Of the variants of candle's error that hold any other, so that it can be found again, only this one is
/// printed as what it holds and nothing else.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => candle_core::Error::Io(std::io::Error::other(error)),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        if Error::from_candle(&error).is_none() {
            return Error::Candle(error);
        }
        recover(error)
    }
}

/// Takes our error out of candle's wrappings.
fn recover(error: candle_core::Error) -> Error {
    use candle_core::Error as E;
    match error {
        E::Io(carrier) => match carrier.downcast::<Error>() {
            Ok(error) => error,
            Err(carrier) => Error::Candle(E::Io(carrier)),
        },
        E::WrappedContext { wrapped, context } => match wrapped.downcast::<Error>() {
            Ok(error) => match *error {
                Error::Candle(inner) => recover(inner),
                error => error,
            },
            Err(wrapped) => match wrapped.downcast::<candle_core::Error>() {
                Ok(inner) => recover(*inner),
                Err(wrapped) => Error::Candle(E::WrappedContext { wrapped, context }),
            },
        },
        E::WithBacktrace { inner, .. } | E::Context { inner, .. } | E::WithPath { inner, .. } => {
            recover(*inner)
        }
        other => Error::Candle(other),
    }
}

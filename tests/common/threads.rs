//! Tests use every core: without the variable that says so, candle's question for the number of cores is most of the time of
//! many tests.

#[path = "../../examples/common/src/threads.rs"]
#[allow(dead_code, unreachable_pub)] // It is a module of the library of the examples.
mod variable;

/// Sets it before there are threads.
#[ctor::ctor(unsafe)]
fn set_the_number_of_threads() {
    variable::set_to_every_core();
}

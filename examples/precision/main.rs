//! What mixed precision costs: relative errors against the same scheme in f64, as the number of
//! steps grows.
//!
//! `cargo run --release --example precision` (about a minute; `--smoke` a few seconds)

mod studies;

use candle_core::DType;
use candle_diffeq::Precision;
use clap::Parser;

/// Errors of f16 and bf16 solves against f64.
#[derive(Parser)]
struct Args {
    /// Fewer steps.
    #[arg(long)]
    smoke: bool,
}

fn main() -> candle_diffeq::Result<()> {
    let args = Args::parse();
    model_equation(if args.smoke { 7 } else { 13 })?;
    stagnation(if args.smoke { &[50] } else { &[50, 200, 2000] })?;
    polynomial()?;
    let (waste, stats) = studies::scaler_waste()?;
    println!(
        "\nscaler on a smooth solve of 128 steps: {waste:.3} pull-backs per stage, {} retries",
        stats.retries
    );
    Ok(())
}

/// The four precisions of the tables.
fn precisions() -> [(&'static str, Precision); 4] {
    [
        ("f16", Precision::f16()),
        ("bf16", Precision::bf16()),
        ("f16, store f16", Precision::f16().store(DType::F16)),
        ("bf16, store bf16", Precision::bf16().store(DType::BF16)),
    ]
}

fn model_equation(last: u32) -> candle_diffeq::Result<()> {
    println!("y' = -5 y, D = 10, rk4: relative error of y(T) / dL/dy0 / dL/dA");
    for (name, precision) in precisions() {
        for exponent in 5..=last {
            let e = studies::model_equation(precision, 1 << exponent)?;
            println!(
                "  {name:16} N = {:5}  {:.1e} / {:.1e} / {:.1e}",
                1 << exponent,
                e.state,
                e.y0,
                e.theta
            );
        }
    }
    Ok(())
}

fn stagnation(steps: &[usize]) -> candle_diffeq::Result<()> {
    println!("\nMLP 2-64-64-2, Euler on [0, 1]: relative error of y(1) / dL/dy0 / dL/dw");
    for &n in steps {
        for (name, precision) in precisions() {
            let (e, _) = studies::stagnation(precision, n)?;
            println!(
                "  {name:16} N = {n:5}  {:.1e} / {:.1e} / {:.1e}",
                e.state, e.y0, e.theta
            );
        }
        let e = studies::naive(DType::BF16, n)?;
        println!(
            "  {:16} N = {n:5}  {:.1e} / {:.1e} / {:.1e}",
            "bf16 tape", e.state, e.y0, e.theta
        );
    }
    Ok(())
}

fn polynomial() -> candle_diffeq::Result<()> {
    println!("\ny' = -(a t^2 + b t + c) y, 399 steps: relative error of dL/dy0, da, db, dc");
    for (name, precision) in [("f32", Precision::f32())].into_iter().chain(precisions()) {
        let [y0, a, b, c] = studies::polynomial(precision)?;
        println!("  {name:16} {y0:.1e}  {a:.1e}  {b:.1e}  {c:.1e}");
    }
    Ok(())
}

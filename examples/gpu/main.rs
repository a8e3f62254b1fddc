//! Times solves on a GPU, forward and forward + backward, beside the memory they take and the errors of
//! their gradients.
//!
//! `cargo run --release --features cuda --example gpu -- [FILES] [--cells W1,G2] [--precision bf16]`
//!
//! Without workload files (`benches/peers/gpu.py` makes some and runs this in turn with PyTorch) the
//! problems are its own, and gradients are compared with its own in f64.  Milliseconds are medians after
//! two runs that are not counted, the device idle when the clock starts and when it stops; MB (2²⁰) are
//! the most that a pass forward and backward takes of the device's pool beside weights, y0 and target.
//!
//! `--training 1000` trains W1 and fails where memory is not flat after ten iterations; `--products`
//! measures matrix products alone.

#[allow(dead_code)]
#[path = "../workloads/fields.rs"]
mod fields;
#[allow(dead_code)]
#[path = "../workloads/models.rs"]
mod models;
#[allow(dead_code)]
#[path = "../workloads/workload.rs"]
mod workload;

mod cells;
mod pass;
mod pool;
mod training;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::Parser;
use serde_json::{json, Value};

use crate::cells::{Cell, CELLS, SMOKE};
use crate::pass::{products, Pass, Patience, GRAPHS, KEPT, OURS, UNFUSED};
use crate::pool::Pool;
use crate::workload::Workload;
use common::dtype::Dtype;
use common::environment::Environment;
use common::table::{sci, Table};
use common::{use_every_core, Result};

/// Times solves on a GPU.
#[derive(Parser)]
struct Args {
    /// Workload files [default: problems of its own].
    files: Vec<PathBuf>,
    /// Which of its own, by name [default: all].
    #[arg(long, value_delimiter = ',')]
    cells: Vec<String>,
    /// Compute precisions.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16,f16")]
    precision: Vec<Dtype>,
    /// Measures small perceptrons step by step, too.
    #[arg(long)]
    unfused: bool,
    /// Measures everything else with CUDA graphs, too.
    #[arg(long)]
    graphs: bool,
    /// Measures everything else with evaluations that are kept for the backward pass, too.
    #[arg(long)]
    kept: bool,
    /// Trains the first of the cells for so many iterations, in place of timing; memory may grow in the first ten.
    #[arg(long, value_parser = clap::value_parser!(u32).range(11..))]
    training: Option<u32>,
    /// Times the products of G2 alone, and one of 8192³, in place of the cells.
    #[arg(long)]
    products: bool,
    /// Seconds for one figure, once it was measured three times.
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Timed runs of one figure at most.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Leaves the pool and candle's events as they are (see docs/cuda.md).
    #[arg(long)]
    stock: bool,
    /// On the CPU, which is for trying this out.
    #[arg(long)]
    cpu: bool,
    /// Lines of JSON on standard output, as figures come, in place of the table.
    #[arg(long)]
    lines: bool,
    /// The same lines go here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Small and once.
    #[arg(long)]
    smoke: bool,
}

fn main() -> ExitCode {
    use_every_core();
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything that was asked for came off.
fn run(args: &Args) -> Result<bool> {
    let own = own(args)?;
    let device = match args.cpu {
        true => Device::Cpu,
        false => Device::new_cuda(0).map_err(|e| format!("no GPU can be used: {e}"))?,
    };
    if let (Some(pool), false) = (Pool::of(&device)?, args.stock) {
        pool.settle(&device)?;
    }
    let environment = Environment::of(&device);
    let mut report = Report::new(args)?;
    report.line(&json!({ "environment": environment }))?;
    if let Some(iterations) = args.training {
        let workload = own.first().ok_or("no cell to train")?.workload(&device)?;
        for dtype in &args.precision {
            let line =
                training::memory(&workload, dtype.precision(), iterations as usize, &device)?;
            let flat = line["flat"] == true;
            report.add(line, *dtype, flat)?;
        }
    } else if args.products {
        let (rows, widths, edge) = match args.smoke {
            true => (4, vec![8, 16, 8], 16),
            false => (4096, vec![512, 2048, 2048, 512], 8192),
        };
        for dtype in &args.precision {
            let kind = native(*dtype);
            let layers = products(&device, kind, rows, &widths, args.patience())?;
            let square = products(&device, kind, edge, &[edge, edge], args.patience())?;
            let line = json!({ "products": "G2", "tflops": layers, "square_tflops": square });
            report.add(line, *dtype, true)?;
        }
    } else {
        cells(args, &own, &device, &mut report)?;
    }
    report.finish(&environment)
}

impl Args {
    fn patience(&self) -> Patience {
        Patience {
            seconds: self.seconds,
            repeats: if self.smoke { 1 } else { self.repeats as usize },
        }
    }
}

/// The dtype of tensors in a precision.
fn native(dtype: Dtype) -> DType {
    dtype.precision().compute
}

/// The problems that are its own, those that were asked for.
///
/// # Errors
/// One was asked for that there is not.
fn own(args: &Args) -> Result<Vec<&'static Cell>> {
    let all: &[Cell] = if args.smoke { &SMOKE } else { &CELLS };
    let names: Vec<_> = all.iter().map(|cell| cell.name).collect();
    if let Some(name) = args.cells.iter().find(|n| !names.contains(&n.as_str())) {
        return Err(format!("--cells {name}: the cells are {}", names.join(", ")).into());
    }
    let wanted = |cell: &&Cell| args.cells.is_empty() || args.cells.iter().any(|n| n == cell.name);
    Ok(all.iter().filter(wanted).collect())
}

/// Every workload in every precision; what fails is said, and the rest goes on.
fn cells(args: &Args, own: &[&Cell], device: &Device, report: &mut Report) -> Result<()> {
    let mut measure = |workload: &Workload| -> Result<()> {
        for dtype in &args.precision {
            for way in [OURS, UNFUSED, GRAPHS, KEPT] {
                let figures = Pass::new(workload, dtype.precision(), way).and_then(|pass| {
                    let in_one = pass.goes_in_one_launch()?;
                    let wanted = if way == UNFUSED {
                        args.unfused && in_one
                    } else if way == GRAPHS {
                        args.graphs && !in_one && device.is_cuda()
                    } else if way == KEPT {
                        args.kept && !in_one && pass.keeps_evaluations()?
                    } else {
                        true
                    };
                    let measured = wanted.then(|| pass.measure(args.patience()));
                    measured.transpose()
                });
                let (mut line, good) = match figures {
                    Ok(None) => continue,
                    Ok(Some(figures)) => (figures, true),
                    Err(error) => (json!({ "error": error.to_string() }), false),
                };
                line["workload"] = json!(workload.name);
                line["library"] = json!(way.name);
                report.add(line, *dtype, good)?;
            }
        }
        Ok(())
    };
    for file in &args.files {
        measure(&Workload::read(file, device)?)?;
    }
    if args.files.is_empty() {
        for cell in own {
            measure(&cell.workload(device)?)?;
        }
    }
    Ok(())
}

/// Lines of JSON as they come, and a table at the end.
struct Report<'a> {
    args: &'a Args,
    file: Option<std::fs::File>,
    table: Table,
    good: bool,
}

fn create(path: &Path) -> Result<std::fs::File> {
    std::fs::File::create(path)
        .map_err(|e| format!("--json {}: cannot be written: {e}", path.display()).into())
}

impl<'a> Report<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        Ok(Self {
            args,
            file: args.json.as_deref().map(create).transpose()?,
            table: Table::new([
                "",
                "",
                "precision",
                "forward ms",
                "+ backward ms",
                "MB",
                "error of θ̄",
                "reads",
            ]),
            good: true,
        })
    }

    fn line(&mut self, line: &Value) -> Result<()> {
        if let Some(file) = &mut self.file {
            writeln!(file, "{line}")?;
        }
        if self.args.lines {
            println!("{line}");
        }
        Ok(())
    }

    /// What was found in a precision, and whether it is as it should be.
    fn add(&mut self, mut line: Value, dtype: Dtype, good: bool) -> Result<()> {
        self.good &= good;
        line["precision"] = json!(dtype.name());
        self.line(&line)?;
        if line["workload"].is_null() || !line["error"].is_null() {
            if !self.args.lines {
                println!("{line}");
            }
            return Ok(());
        }
        let number = |key: &str| line[key].as_f64();
        let milliseconds = |key| number(key).map_or(String::new(), |x| format!("{x:.2}"));
        let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        self.table.row([
            text("workload"),
            text("library"),
            dtype.name().to_owned(),
            milliseconds("fwd_ms"),
            milliseconds("fwdbwd_ms"),
            number("peak_mb").map_or(String::new(), |x| format!("{x:.1}")),
            sci(number("err_grad_w").unwrap_or(f64::NAN)),
            format!("{} + {}", line["reads_fwd"], line["reads_bwd"]),
        ]);
        Ok(())
    }

    fn finish(self, environment: &Environment) -> Result<bool> {
        if !self.args.lines {
            println!("{environment}");
            if self.args.training.is_none() && !self.args.products {
                println!("{}", self.table);
            }
        }
        Ok(self.good)
    }
}

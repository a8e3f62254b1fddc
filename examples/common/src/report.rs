//! What an example came to: its figures as JSON beside its pictures, and whether it holds.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::Device;
use serde::Serialize;
use serde_json::{json, Map, Value};

use super::environment::Environment;
use super::flags::{Flags, Size};
use super::team::Team;
use super::{use_every_core, Result};

/// Runs an example: prints where, and afterwards what was missed; writes `NAME.json`.
///
/// The exit code is 1 after an error, a missed demand, a picture that was not drawn, or a figure that
/// is not finite.
pub fn run(
    name: &'static str,
    flags: &Flags,
    body: impl FnOnce(&Device, &mut Report) -> Result<()>,
) -> ExitCode {
    use_every_core();
    ended(attempt(name, flags, body))
}

/// The same on one rank of a team, all of which run the body and come to the same; the first says it.
pub fn run_together(
    name: &'static str,
    flags: &Flags,
    team: Result<Team>,
    body: impl FnOnce(&Team, &Device, &mut Report) -> Result<()>,
) -> ExitCode {
    let run = || {
        let team = team?;
        if team.leads() {
            let outcome = attempt(name, flags, |device, report| body(&team, device, report));
            return team.told(outcome);
        }
        // What the others come to is thrown away.
        let mut report = Report::new(flags.out.join(name), flags.size());
        let outcome = flags
            .device()
            .and_then(|device| body(&team, &device, &mut report));
        team.told(outcome).map(|()| vec![])
    };
    use_every_core();
    ended(run())
}

fn ended(outcome: Result<Vec<String>>) -> ExitCode {
    match outcome {
        Ok(missed) if missed.is_empty() => ExitCode::SUCCESS,
        Ok(missed) => {
            missed.iter().for_each(|line| eprintln!("missed: {line}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn attempt(
    name: &'static str,
    flags: &Flags,
    body: impl FnOnce(&Device, &mut Report) -> Result<()>,
) -> Result<Vec<String>> {
    let device = flags.device()?;
    let environment = Environment::of(&device);
    println!("{name}: {environment}\n");
    std::fs::create_dir_all(&flags.out)
        .map_err(|e| format!("cannot make {}: {e}", flags.out.display()))?;
    let mut report = Report::new(flags.out.join(name), flags.size());
    let clock = Instant::now();
    body(&device, &mut report)?;
    report.finish(name, &environment, clock.elapsed().as_secs_f64())
}

/// Figures, pictures and demands of one run.
pub struct Report {
    stem: PathBuf,
    size: Size,
    pictures: Vec<PathBuf>,
    figures: Map<String, Value>,
    missed: Vec<String>,
}

impl Report {
    fn new(stem: PathBuf, size: Size) -> Self {
        Self {
            stem,
            size,
            pictures: vec![],
            figures: Map::new(),
            missed: vec![],
        }
    }

    /// Where to draw a picture: `NAME.png`, or `NAME_part.png`.
    pub fn picture(&mut self, part: &str) -> PathBuf {
        let mut path = self.stem.clone().into_os_string();
        if !part.is_empty() {
            path.push("_");
            path.push(part);
        }
        path.push(".png");
        self.pictures.push(path.clone().into());
        path.into()
    }

    /// Notes a figure, or any structure of them.  What is missing is left out: a `None` counts as not
    /// finite, as NaN does.
    pub fn figure(&mut self, name: &str, figure: impl Serialize) -> Result<()> {
        let figure = serde_json::to_value(figure)?;
        self.figures.insert(name.to_owned(), figure);
        Ok(())
    }

    /// Notes what must hold, unless the run is a smoke test.
    pub fn demand(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds && self.size != Size::Smoke {
            self.missed.push(otherwise());
        }
    }

    fn finish(
        mut self,
        name: &str,
        environment: &Environment,
        seconds: f64,
    ) -> Result<Vec<String>> {
        let figures = Value::Object(self.figures);
        let mut bad = vec![];
        non_finite(name, &figures, &mut bad);
        self.missed
            .extend(bad.into_iter().map(|what| format!("{what} is not finite")));
        for picture in &self.pictures {
            if !picture.is_file() {
                let line = format!("{} was not drawn", picture.display());
                self.missed.push(line);
            }
        }
        let path = self.stem.with_extension("json");
        let report = json!({
            "example": name,
            "command": std::env::args().skip(1).collect::<Vec<_>>(),
            "environment": environment,
            "seconds": seconds,
            "figures": figures,
            "missed": self.missed,
        });
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(&path, text + "\n")
            .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        println!("\n{seconds:.0} s");
        for file in self.pictures.iter().chain([&path]) {
            println!("{}", file.display());
        }
        Ok(self.missed)
    }
}

/// A figure that may be infinite or NaN without anything being wrong: as text if it is.
pub fn any(figure: f64) -> Value {
    match figure.is_finite() {
        true => json!(figure),
        false => json!(figure.to_string()),
    }
}

/// Paths of what JSON calls null: there is no NaN and no infinity in it.
fn non_finite(path: &str, value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Null => found.push(path.to_owned()),
        Value::Array(values) => values
            .iter()
            .enumerate()
            .for_each(|(i, value)| non_finite(&format!("{path}[{i}]"), value, found)),
        Value::Object(values) => values
            .iter()
            .for_each(|(key, value)| non_finite(&format!("{path}.{key}"), value, found)),
        _ => {}
    }
}

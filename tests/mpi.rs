//! The same as tests/distributed.rs under `mpirun`, and what becomes of a group whose ranks fail, die, or do not come.
//!
//! `cargo test --release --features mpi --test mpi`, a minute; needs Open MPI (`scripts/mpi.sh` installs it).
#![cfg(feature = "mpi")]

mod common;
mod group;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::distributed::{Group, MpiGroup, Patience, Replicas};
use candle_diffeq::error::GroupDefect;
use candle_diffeq::Result;
use candle_nn::{VarMap, SGD};

use crate::common::{bits, named};
use crate::group::{cpu, defect, SCENARIOS};

/// What the worker is to do, and where it writes what it came to.
const CASE: &str = "CANDLE_DIFFEQ_MPI_CASE";
const OUT: &str = "CANDLE_DIFFEQ_MPI_OUT";

/// Nothing takes longer, or it hangs.
const LIMIT: Duration = Duration::from_secs(120);
/// The others end within this time.
const END: Duration = Duration::from_secs(30);

/// A case of several processes: they run, and what each has written is kept.
struct Run {
    folder: tempfile::TempDir,
    took: Duration,
    ended: bool,
    text: String,
}

/// Ranks of the test `worker` of this very program.
fn start(case: &str, ranks: usize, folder: &Path, options: &[&str]) -> Child {
    let program = std::env::current_exe().unwrap();
    let log = fs::File::create(folder.join("log")).unwrap();
    Command::new("mpirun")
        .args([
            "-n",
            &ranks.to_string(),
            "--oversubscribe",
            "--allow-run-as-root",
        ])
        .args(options)
        .arg(program)
        .args([
            "--exact",
            "worker",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CASE, case)
        .env(OUT, folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("mpirun is there: scripts/mpi.sh installs it")
}

fn run(case: &str, ranks: usize, options: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let mut child = start(case, ranks, folder.path(), options);
    let ended = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.success();
        }
        if started.elapsed() > LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{case} hangs:\n{}", text(folder.path()));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    Run {
        took: started.elapsed(),
        ended,
        text: text(folder.path()),
        folder,
    }
}

fn text(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap()
}

impl Run {
    /// What a rank has written at its end.
    #[track_caller]
    fn of(&self, rank: usize) -> String {
        let path = self.folder.path().join(rank.to_string());
        fs::read_to_string(path).unwrap_or_else(|e| panic!("rank {rank}: {e}\n{}", self.text))
    }

    #[track_caller]
    fn says(&self, rank: usize, expected: &str) {
        let got = self.of(rank);
        assert!(got.contains(expected), "rank {rank}: {got}\n{}", self.text);
    }
}

/// What a case takes at most in which nobody waits for a silent rank: the silence that is waited for by default.
const SILENCE: Duration = Duration::from_secs(15);

/// Others go on when a rank has died, instead of being ended by `mpirun`.
const GOES_ON: &[&str] = &["--continuous"];

#[test]
fn all_scenarios_hold_on_two_and_on_four_ranks() {
    for ranks in [2, 4] {
        let run = run("scenarios", ranks, &[]);
        assert!(run.ended, "{}", run.text);
        for rank in 0..ranks {
            run.says(rank, "done");
        }
        let shown = run
            .text
            .lines()
            .filter(|l| l.contains("ranks:") || l.contains("bits in"));
        shown.for_each(|line| println!("{line}"));
    }
}

#[test]
fn two_starts_of_as_many_processes_give_the_same_bits() {
    let bits = || {
        let run = run("bits", 2, &[]);
        assert!(run.ended, "{}", run.text);
        // What stands before on a line is not this test's, and may come from both ranks.
        let lines = run.text.lines();
        let bits = lines.filter_map(|l| l.find("bits in").map(|at| l[at..].to_owned()));
        bits.collect::<Vec<_>>()
    };
    let (first, second) = (bits(), bits());
    assert_eq!(first.len(), 2);
    assert_eq!(first, second);
}

/// The others name the killed rank in time, and the last checkpoint loads.
fn names_the_killed(case: &str, killed: usize) {
    let run = run(case, 3, GOES_ON);
    for rank in (0..3).filter(|rank| *rank != killed) {
        // The one who finds out says "lost", and the other hears of it.
        let said = run.of(rank);
        let named = ["Lost", "Left"].map(|how| format!("{how} {{ rank: {killed}"));
        assert!(named.iter().any(|named| said.contains(named)), "{said}");
        let seconds: f64 = said.split_whitespace().next().unwrap().parse().unwrap();
        println!("rank {rank}: {said}");
        assert!(seconds < END.as_secs_f64(), "{seconds} s");
    }
    assert!(run.took < END + Duration::from_secs(5), "{:?}", run.took);
    let mut vars = VarMap::new();
    let zero = Var::zeros(3, DType::F32, &Device::Cpu).unwrap();
    vars.data().lock().unwrap().insert("w".into(), zero);
    vars.load(run.folder.path().join("model.safetensors"))
        .unwrap();
    let saved = fs::read_to_string(run.folder.path().join("saved")).unwrap();
    assert_eq!(format!("{:?}", bits(&named(&vars, "w"))), saved);
}

#[test]
fn a_killed_rank_is_named_by_the_others_in_time_and_the_last_checkpoint_loads() {
    names_the_killed("killed", 2);
}

#[test]
fn so_is_rank_0() {
    names_the_killed("killed first", 0);
}

#[test]
fn mpirun_by_itself_ends_the_others_and_names_the_killed_rank() {
    let run = run("killed", 3, &[]);
    assert!(!run.ended && run.took < END, "{:?}", run.took);
    assert!(run.text.contains("rank 2"), "{}", run.text);
}

#[test]
fn a_suspended_rank_is_taken_for_dead() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = start("suspended", 2, folder.path(), GOES_ON);
    let started = Instant::now();
    let found = loop {
        if let Ok(found) = fs::read_to_string(folder.path().join("0")) {
            break found;
        }
        assert!(started.elapsed() < LIMIT, "{}", text(folder.path()));
        std::thread::sleep(Duration::from_millis(50));
    };
    let pid = fs::read_to_string(folder.path().join("pid")).unwrap();
    Command::new("kill").args(["-9", &pid]).status().unwrap();
    child.wait().unwrap();
    assert!(found.contains("Lost { rank: 1"), "{found}");
}

#[test]
fn a_rank_that_fails_tells_the_others_why() {
    let run = run("fails", 3, GOES_ON);
    run.says(1, "NonFiniteCotangent");
    for rank in [0, 2] {
        run.says(rank, "Left { rank: 1");
        run.says(rank, "NaN or infinity");
    }
}

#[test]
fn a_rank_that_goes_or_panics_while_others_need_it_is_named() {
    let run = run("goes", 2, GOES_ON);
    run.says(0, "Left { rank: 1");
    run.says(0, "others were not");
    // Nobody waits for a rank that has gone, not even until it counts as silent.
    assert!(run.took < SILENCE, "{:?}", run.took);
    let run = self::run("panics", 2, GOES_ON);
    run.says(0, "Left { rank: 1, reason: \"it panicked\"");
    assert!(run.took < SILENCE, "{:?}", run.took);
}

#[test]
fn a_rank_that_computes_for_longer_than_the_silence_is_waited_for() {
    let run = run("computes", 2, &[]);
    assert!(run.ended, "{}", run.text);
    run.says(0, "done");
}

#[test]
fn a_rank_that_is_done_waits_for_the_others_for_longer_than_a_rank_may_be_late() {
    let run = run("done early", 2, &[]);
    assert!(run.ended, "{}", run.text);
    (0..2).for_each(|rank| run.says(rank, "done"));
}

#[test]
fn a_rank_that_waits_for_another_to_start_a_second_group_is_not_taken_for_dead() {
    let run = run("second", 2, &[]);
    assert!(run.ended, "{}", run.text);
    (0..2).for_each(|rank| run.says(rank, "done, done"));
}

#[test]
fn a_rank_that_is_alive_but_does_not_come_is_named() {
    let run = run("late", 2, GOES_ON);
    run.says(0, "Late { rank: 1");
    run.says(1, "Left { rank: 1");
    run.says(1, "as rank 0 found");
}

#[test]
fn ranks_that_do_different_operations_are_told_which() {
    let run = run("length", 2, GOES_ON);
    run.says(1, "OtherOperation { rank: 0");
    run.says(1, "a broadcast of 4000 bytes from rank 0");
    run.says(0, "Left { rank: 1");
    for case in ["order", "kinds", "shape"] {
        let run = self::run(case, 2, GOES_ON);
        let said = [0, 1].map(|rank| run.of(rank));
        let told = |i: usize| said[i].contains("OtherOperation") || said[i].contains("Gradient");
        assert!(told(0) || told(1), "{said:?}\n{}", run.text);
        let named = |i: usize| told(i) || said[i].contains(&format!("Left {{ rank: {}", 1 - i));
        assert!(named(0) && named(1), "{said:?}");
        assert!(run.took < SILENCE, "{:?}", run.took);
    }
}

#[test]
fn operations_are_the_same_in_pieces() {
    let run = run("pieces", 3, &[]);
    assert!(run.ended, "{}", run.text);
    (0..3).for_each(|rank| run.says(rank, "done"));
}

#[test]
fn ranks_that_compute_on_every_core_are_not_taken_for_dead() {
    let run = run("crowded", 8, &[]);
    assert!(run.ended, "{}", run.text);
    (0..8).for_each(|rank| run.says(rank, "done"));
}

#[test]
fn several_groups_end_mpi_with_the_last_of_them() {
    let run = run("groups", 2, &[]);
    assert!(run.ended, "{}", run.text);
    (0..2).for_each(|rank| run.says(rank, "cannot be started again"));
}

#[test]
fn without_a_launcher_a_group_has_one_rank() {
    let folder = tempfile::tempdir().unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker", "--ignored", "--test-threads=1"])
        .env(CASE, "alone")
        .env(OUT, folder.path())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(
        fs::read_to_string(folder.path().join("0")).unwrap(),
        "1 rank"
    );
}

#[test]
fn a_group_can_be_joined_but_not_started_again() {
    let run = run("again", 2, &[]);
    assert!(run.ended, "{}", run.text);
    run.says(0, "cannot be started again");
    run.says(1, "cannot be started again");
}

/// One rank of a case; no test by itself.
#[test]
#[ignore = "a process of the other tests"]
fn worker() {
    let (Ok(case), Some(out)) = (std::env::var(CASE), std::env::var_os(OUT)) else {
        return;
    };
    let out = PathBuf::from(out);
    let seconds = Duration::from_secs;
    let short = Patience {
        silence: seconds(2),
        ..Default::default()
    };
    let patience = match &*case {
        "scenarios" | "bits" | "killed" | "killed first" | "goes" | "panics" => Patience::default(),
        "late" => Patience {
            late: seconds(2),
            ..short
        },
        "done early" => Patience {
            late: seconds(1),
            ..short
        },
        "second" => Patience {
            silence: seconds(1),
            ..short
        },
        _ => short,
    };
    let group = MpiGroup::with_patience(patience).unwrap();
    let rank = group.rank();
    let said = match &*case {
        "scenarios" => scenarios(&group),
        "bits" => {
            group::two_runs_give_the_same_bits(&group);
            "done".into()
        }
        "killed" => killed(&group, &out, group.size() - 1),
        "killed first" => killed(&group, &out, 0),
        "fails" => fails(&group),
        "shape" => shape(&group),
        "alone" => {
            group.give_up("a group of one process goes on");
            group.barrier().unwrap();
            format!("{} rank", group.size())
        }
        "computes" | "late" => {
            if rank == 1 {
                std::thread::sleep(seconds(6));
            }
            outcome(group.barrier())
        }
        "done early" => {
            if rank == 0 {
                std::thread::sleep(seconds(4));
            }
            "done".into()
        }
        "second" => {
            let start = move || {
                if rank == 1 {
                    std::thread::sleep(seconds(4));
                }
                outcome(MpiGroup::with_patience(short).and_then(|second| second.barrier()))
            };
            let second = std::thread::spawn(start);
            // Rank 0 is in the start of the second group by now, and rank 1 waits for it in the first.
            std::thread::sleep(Duration::from_millis([500, 0][rank]));
            let first = outcome(group.barrier());
            format!("{first}, {}", second.join().unwrap())
        }
        "suspended" => {
            if rank == 1 {
                let pid = std::process::id().to_string();
                fs::write(out.join("pid"), &pid).unwrap();
                Command::new("kill").args(["-STOP", &pid]).status().unwrap();
                // The signal has been sent, but this thread may run on for a moment: it must not reach the barrier.
                std::thread::sleep(LIMIT);
            }
            outcome(group.barrier())
        }
        "goes" | "panics" => {
            group.barrier().unwrap();
            match (rank, &*case) {
                (0, _) => outcome(group.barrier()),
                (_, "goes") => "gone".into(),
                _ => panic!("on purpose"),
            }
        }
        "order" => match rank {
            0 => outcome(group.barrier()),
            _ => outcome(group.sum(&cpu(&[1f32; 3]))),
        },
        "kinds" => match rank {
            0 => outcome(group.max(&cpu(&[1f32; 3]))),
            _ => outcome(group.sum(&cpu(&[1f32; 3]))),
        },
        "pieces" => {
            // Of few numbers, so that every operation takes several messages.
            let group = MpiGroup::with_patience(short).unwrap().longest_message(11);
            for name in ["operations", "training", "bf16", "precisions"] {
                let (_, scenario) = SCENARIOS.into_iter().find(|(n, _)| *n == name).unwrap();
                scenario(&group);
            }
            "done".into()
        }
        "crowded" => {
            let until = Instant::now() + seconds(4) + rank as u32 * Duration::from_millis(200);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            outcome(group.barrier())
        }
        "groups" => {
            let second = MpiGroup::with_patience(short).unwrap();
            drop(group);
            // Its thread goes on for longer than it sleeps.
            std::thread::sleep(Duration::from_millis(300));
            second.barrier().unwrap();
            drop(second);
            let said = format!("{}", defect(MpiGroup::start().map(drop)));
            return fs::write(out.join(rank.to_string()), said).unwrap();
        }
        "length" => {
            let x = Tensor::zeros([1000, 1][rank], DType::F32, &Device::Cpu).unwrap();
            outcome(group.broadcast(&x, 0).and_then(|_| group.barrier()))
        }
        "again" => {
            let second = MpiGroup::start().unwrap();
            assert_eq!(second.rank(), rank);
            second.barrier().unwrap();
            drop(second);
            group.barrier().unwrap();
            drop(group);
            let said = format!("{}", defect(MpiGroup::start().map(drop)));
            return fs::write(out.join(rank.to_string()), said).unwrap();
        }
        other => panic!("no case {other}"),
    };
    drop(group);
    // Whole at once, for who waits for it.
    fs::write(out.join(format!("{rank}.part")), said).unwrap();
    fs::rename(out.join(format!("{rank}.part")), out.join(rank.to_string())).unwrap();
}

fn outcome<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => "done".into(),
        Err(error) => format!("{error:?}"),
    }
}

fn scenarios(group: &MpiGroup) -> String {
    for (name, scenario) in SCENARIOS {
        let clock = Instant::now();
        scenario(group);
        if group.rank() == 0 {
            println!("{name}: {:.2} s", clock.elapsed().as_secs_f64());
        }
    }
    "done".into()
}

/// A model w (3), and its replicas' optimiser.
fn model() -> (VarMap, Var) {
    let vars = VarMap::new();
    let w = Var::new(&[0.5f32, -1.0, 2.0], &Device::Cpu).unwrap();
    vars.data().lock().unwrap().insert("w".into(), w.clone());
    (vars, w)
}

/// One rank kills itself in the middle; the others say what they get, and how long they have waited.
fn killed(group: &MpiGroup, out: &Path, victim: usize) -> String {
    let (vars, w) = model();
    let replicas = Replicas::new(group, &vars).unwrap();
    let mut sgd = <SGD as candle_nn::Optimizer>::new(replicas.variables(), 0.01).unwrap();
    let mut clock = Instant::now();
    for i in 0..40 {
        if i == 20 && group.rank() == victim {
            let pid = std::process::id().to_string();
            Command::new("kill").args(["-9", &pid]).status().unwrap();
        }
        let loss = w.sqr().unwrap().sum_all().unwrap();
        if let Err(error) = replicas.backward_step(&loss, 1, &mut sgd) {
            return format!(
                "{:.1} s, iteration {i}: {error:?}",
                clock.elapsed().as_secs_f64()
            );
        }
        if i % 5 == 0 {
            replicas.save(out.join("model.safetensors")).unwrap();
            if group.rank() == 0 {
                fs::write(out.join("saved"), format!("{:?}", bits(&w))).unwrap();
            }
        }
        clock = Instant::now();
    }
    "done".into()
}

fn fails(group: &MpiGroup) -> String {
    let (vars, w) = model();
    let replicas = Replicas::new(group, &vars).unwrap();
    let mut sgd = <SGD as candle_nn::Optimizer>::new(replicas.variables(), 0.01).unwrap();
    let y0 = (w.as_tensor() * 1.0).unwrap();
    let field = |_: &candle_diffeq::Time, y: &Tensor| y.neg();
    let y = candle_diffeq::odeint(field, &y0, &[0.0, 1.0], &Default::default()).unwrap();
    let mut loss = y.sum_all().unwrap();
    if group.rank() == 1 {
        loss = (loss * f64::INFINITY).unwrap();
    }
    let first = replicas.backward_step(&loss, 1, &mut sgd);
    // The group stays ended.
    for again in [group.sum(&cpu(1f32)).map(drop), group.watch(Duration::ZERO)] {
        assert!(matches!(defect(again), GroupDefect::Left { rank: 1, .. }));
    }
    outcome(first)
}

/// Rank 1 has a gradient of another shape.
fn shape(group: &MpiGroup) -> String {
    let (vars, w) = model();
    let replicas = Replicas::new(group, &vars).unwrap();
    let mut grads = w.sum_all().unwrap().backward().unwrap();
    if group.rank() == 1 {
        grads.insert(&w, cpu(&[1f32; 5]));
    }
    outcome(replicas.average(&mut grads, 1))
}

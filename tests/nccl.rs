//! The feature `nccl` where there is no NCCL: a library of stubs, whose calls fail, and CUDA's stand-in on the host.
//!
//! `cargo test --release --features nccl --test nccl` over the libraries of scripts/host-cuda.sh; .ci/cuda says how.
#![cfg(feature = "nccl")]

use candle_core::Device;
use candle_diffeq::distributed::{Alone, NcclGroup};
use candle_diffeq::error::GroupDefect;
use candle_diffeq::Error;

#[test]
fn a_group_that_nccl_cannot_start_says_why() {
    let refused = |device: &Device| match NcclGroup::new(Alone, device).map(drop) {
        Err(Error::Group(GroupDefect::Start { reason })) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(&Device::Cpu).contains("NCCL connects GPUs"));
    let gpu = Device::new_cuda(0).unwrap();
    assert!(refused(&gpu).contains("ncclSystemError"));
}

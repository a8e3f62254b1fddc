//! IDX files, the format of MNIST: arrays of bytes, plain or gzipped.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;

use super::Result;

/// An array of bytes, the last dimension running fastest.
#[derive(Debug, PartialEq)]
pub struct Idx {
    pub dims: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Reads a file; that it is gzipped is seen from its first bytes.
pub fn read(path: &Path) -> Result<Idx> {
    let named = |what: String| format!("{}: {what}", path.display());
    let mut file = vec![];
    File::open(path)
        .and_then(|mut f| f.read_to_end(&mut file))
        .map_err(|e| named(e.to_string()))?;
    if file.starts_with(&[0x1f, 0x8b]) {
        let mut plain = vec![];
        MultiGzDecoder::new(&*file)
            .read_to_end(&mut plain)
            .map_err(|e| named(e.to_string()))?;
        file = plain;
    }
    Ok(parse(&file).map_err(named)?)
}

/// Magic number `0, 0, type, dimensions`, the dimensions in four bytes each, big end first; the array.
pub fn parse(file: &[u8]) -> std::result::Result<Idx, String> {
    const BYTES: u8 = 8;
    let &[0, 0, kind, rank, ref rest @ ..] = file else {
        return Err("no IDX file".to_owned());
    };
    if kind != BYTES {
        return Err(format!("an IDX file of type {kind:#x}, not of bytes"));
    }
    let Some((dims, bytes)) = rest.split_at_checked(4 * usize::from(rank)) else {
        return Err("the IDX header is cut off".to_owned());
    };
    let dim = |d: &[u8]| {
        d.iter()
            .fold(0usize, |n, byte| (n << 8) | usize::from(*byte))
    };
    let dims: Vec<usize> = dims.chunks(4).map(dim).collect();
    let wanted = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    if wanted != Some(bytes.len()) {
        let got = bytes.len();
        return Err(format!("an IDX file of shape {dims:?} holds {got} bytes"));
    }
    Ok(Idx {
        dims,
        bytes: bytes.to_vec(),
    })
}

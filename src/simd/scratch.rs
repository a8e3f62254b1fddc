//! Memory for vectors.  Much of it goes back to the system when it is free: in an allocator's heap of a
//! thread it would leave holes between what other passes leave there.

use bytemuck::Pod;
use memmap2::MmapMut;

/// Zeroed memory.
pub(crate) struct Scratch {
    memory: Memory,
    /// What was asked for.  Lines and pages hold more, which nobody may see: who takes all that is left
    /// for a part of it would take too much, or not, by the size of a vector.
    bytes: usize,
}

enum Memory {
    Heap(Vec<Line>),
    /// Costs nothing until it is written; large pages where the system has them, because faults on small
    /// ones cost more than what they hold.
    Pages(MmapMut),
}

/// Memory that vectors of any unit may begin at.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// Bytes from which on pages are asked for: what is less, the allocator has at hand.
const LARGE: usize = 1 << 20;

impl Scratch {
    /// So many bytes; where the system does not give them, the allocator aborts.
    pub(crate) fn new(bytes: usize) -> Self {
        Self::try_new(bytes).unwrap_or_else(|| Self::of(bytes, None))
    }

    /// The same, or `None` where the system does not give them.
    pub(crate) fn try_new(bytes: usize) -> Option<Self> {
        let pages = match bytes {
            LARGE.. => Some(MmapMut::map_anon(bytes).ok()?),
            _ => None,
        };
        Some(Self::of(bytes, pages))
    }

    fn of(bytes: usize, pages: Option<MmapMut>) -> Self {
        let memory = match pages {
            Some(pages) => {
                // A wish: small pages hold the same.
                #[cfg(target_os = "linux")]
                let _ = pages.advise(memmap2::Advice::HugePage);
                Memory::Pages(pages)
            }
            None => Memory::Heap(bytemuck::zeroed_vec(bytes.div_ceil(size_of::<Line>()))),
        };
        Self { memory, bytes }
    }

    /// As many numbers as there are whole ones of.
    pub(crate) fn numbers<N: Pod>(&self) -> &[N] {
        let all = match &self.memory {
            Memory::Heap(lines) => bytemuck::cast_slice(lines),
            // Whole ones: what is cast must not leave a rest.
            Memory::Pages(pages) => bytemuck::cast_slice(&pages[..whole::<N>(self.bytes)]),
        };
        &all[..self.bytes / size_of::<N>()]
    }

    pub(crate) fn numbers_mut<N: Pod>(&mut self) -> &mut [N] {
        let all = match &mut self.memory {
            Memory::Heap(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Pages(pages) => bytemuck::cast_slice_mut(&mut pages[..whole::<N>(self.bytes)]),
        };
        &mut all[..self.bytes / size_of::<N>()]
    }
}

/// Bytes of the numbers of which there are whole ones.
fn whole<N>(bytes: usize) -> usize {
    bytes / size_of::<N>() * size_of::<N>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_holds_as_many_numbers_as_there_are_whole_ones_of() {
        for bytes in [0, 4, 12, 60, 68, LARGE, LARGE + 4, 1_199_988] {
            let mut scratch = Scratch::new(bytes);
            assert_eq!(scratch.numbers::<u8>().len(), bytes);
            assert_eq!(scratch.numbers::<f32>().len(), bytes / 4);
            assert_eq!(scratch.numbers::<f64>().len(), bytes / 8);
            assert_eq!(scratch.numbers_mut::<f64>().len(), bytes / 8);
        }
    }
}

//! Decoded code: operations, the blocks that they stand in, and the blocks that a CPU keeps, by address and physical
//! page.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::arena::Arena;
use super::core::Decoded;
use super::engine::Engine;
use super::mmu::PAGE_MASK;
use super::vector::VectorFn;
use super::vector_call::VectorCall;
use crate::code_lines::CodeLines;

/// The most instructions of a block. Handlers call one another within a block, so this bounds the stack where the
/// compiler makes no tail calls.
pub(super) const LONGEST: usize = 64;
/// More blocks than this are not kept.
const MOST: usize = 1 << 18;
/// Nor more words of them and of those that were dropped.
const MOST_WORDS: usize = 1 << 24;
/// Chains of blocks to begin with.
const CHAINS: usize = 1024;

/// Executes an operation and all that follow it in its block. Returns the next block, or null with
/// [`Engine::stop`] set.
///
/// # Safety
/// The operation is one of the engine's current block, made for this handler.
pub(super) type Handler = unsafe fn(&mut Engine, *const Op) -> *mut Block;

/// One operation. Registers are byte offsets into [`Engine::regs`].
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Op {
    pub run: Handler,
    /// Immediate, or the number of a side-table entry, or a branch target relative to the block.
    pub imm: i32,
    /// Displacement of the memory operand, or a second immediate.
    pub disp: i32,
    pub base: u8,
    pub index: u8,
    /// Shift of the index.
    pub scale: u8,
    pub r1: u8,
    pub r2: u8,
    /// Instructions of the block before this one.
    pub number: u8,
    /// Where the instruction begins, from the block's start.
    pub at: u16,
}

/// Where a block leads to.
#[derive(Clone, Copy)]
pub(super) struct Link {
    pub block: *mut Block,
    /// Valid while the MMU has this generation.
    pub generation: u64,
}

/// A run of instructions that is entered at its beginning. It stands in the arena of a [`Cache`], and so does all that it
/// refers to: these pointers are valid as long as the block is.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Linear address.
    pub rip: u64,
    /// Instructions.
    pub count: u64,
    /// The first of its operations, of which the last ends blocks.
    pub first: *const Op,
    /// The taken branch, and what follows.
    pub links: [Link; 2],
    /// Bytes.
    pub length: u64,
    /// Guest-physical address.
    pub physical: u64,
    /// Made of one instruction, whatever follows; never linked.
    pub is_single: bool,
    /// What its operations refer to by number.
    pub tables: Tables<*const Decoded, *const VectorCall, *const VectorFn>,
    /// The bytes that it was made from, if another CPU may change them unseen, or null.
    pub code: *const u8,
    /// The next block of the same chain.
    next: *mut Block,
    /// The next block of the same page.
    next_of_page: *mut Block,
}

impl Block {
    /// What it was made from; empty if that does not matter.
    pub fn code(&self) -> &[u8] {
        if self.code.is_null() {
            return &[];
        }
        // SAFETY: so many bytes stand there.
        unsafe { std::slice::from_raw_parts(self.code, usize::try_from(self.length).expect("at most a page")) }
    }
}

/// What operations refer to by number.
#[derive(Clone, Copy, Default)]
pub(super) struct Tables<S, V, F> {
    /// Instructions that operations of the slow kind execute.
    pub slow: S,
    /// Calls of vector operations.
    pub vectors: V,
    /// Functions that vector operations are no more than a call of.
    pub functions: F,
}

/// A block in the making: what a [`Cache`] copies to where blocks stand.
pub(super) struct Draft<'a> {
    pub rip: u64,
    pub physical: u64,
    pub is_single: bool,
    /// Bytes.
    pub length: u64,
    /// Instructions.
    pub count: u64,
    pub ops: &'a [Op],
    pub tables: Tables<&'a [Decoded], &'a [VectorCall], &'a [VectorFn]>,
    /// What to compare with the code before the block is used again; empty if that is not needed.
    pub code: &'a [u8],
}

/// Hashes addresses.
#[derive(Default)]
pub(super) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64((*byte).into());
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(29) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
}

type Hash = BuildHasherDefault<AddressHasher>;

/// The blocks of a physical page.
struct CodePage {
    version: u32,
    /// The first of a list.
    first: *mut Block,
}

/// All blocks of a CPU. Pointers to them are valid until all are dropped, which happens only between blocks; whoever keeps
/// a pointer marks it with the MMU's generation, which the caller raises when any were dropped.
pub(super) struct Cache {
    /// Blocks, those that were dropped included.
    arena: Arena,
    /// The first blocks of chains, by the hash of their addresses. As many as a power of two.
    chains: Box<[*mut Block]>,
    /// Blocks in the chains.
    count: usize,
    pages: HashMap<u64, CodePage, Hash>,
}

impl Default for Cache {
    fn default() -> Self {
        let chains = Box::default();
        Self { arena: Arena::default(), chains, count: 0, pages: HashMap::default() }
    }
}

/// What follows a block in a list.
type Next = fn(*mut Block) -> *mut *mut Block;

/// The place of the next block of the same chain.
fn next(block: *mut Block) -> *mut *mut Block {
    // SAFETY: blocks in lists are alive.
    unsafe { &raw mut (*block).next }
}

/// The place of the next block of the same page.
fn next_of_page(block: *mut Block) -> *mut *mut Block {
    // SAFETY: blocks in lists are alive.
    unsafe { &raw mut (*block).next_of_page }
}

/// Takes a block out of a list.
fn unlink(mut place: *mut *mut Block, block: *mut Block, next: Next) {
    // SAFETY: the beginning of a list, or a place in a block of it.
    unsafe {
        while !(*place).is_null() {
            if *place == block {
                *place = *next(block);
                return;
            }
            place = next(*place);
        }
    }
}

impl Cache {
    /// The chain for a linear and a physical address.
    #[inline]
    fn chain(&self, rip: u64, physical: u64) -> usize {
        let mut hasher = AddressHasher::default();
        hasher.write_u64(rip);
        hasher.write_u64(physical);
        // Below the number of chains, which is a size.
        usize::try_from(hasher.finish()).unwrap_or(0) & (self.chains.len() - 1)
    }

    /// The block at that address.
    pub fn get(&self, rip: u64, physical: u64, is_single: bool) -> Option<*mut Block> {
        if self.count == 0 {
            return None;
        }
        let mut block = self.chains[self.chain(rip, physical)];
        while !block.is_null() {
            // SAFETY: blocks in chains are alive.
            let known = unsafe { &*block };
            if known.rip == rip && known.physical == physical && known.is_single == is_single {
                return Some(block);
            }
            block = known.next;
        }
        None
    }

    /// Drops a block.
    pub fn remove(&mut self, block: *mut Block) {
        // SAFETY: the caller has it from `get`.
        let page = unsafe { (*block).physical & PAGE_MASK };
        self.take_out(block);
        if let Some(code) = self.pages.get_mut(&page) {
            unlink(&raw mut code.first, block, next_of_page);
        }
    }

    /// Takes a block out of its chain.
    fn take_out(&mut self, block: *mut Block) {
        // SAFETY: it is in its chain, so it is alive.
        let known = unsafe { &*block };
        let chain = self.chain(known.rip, known.physical);
        unlink(&raw mut self.chains[chain], block, next);
        self.count -= 1;
    }

    /// Puts a block into its chain.
    #[inline]
    fn put_in(&mut self, block: *mut Block) {
        // SAFETY: a block that has just been made, or was in a chain.
        let made = unsafe { &mut *block };
        let chain = self.chain(made.rip, made.physical);
        made.next = std::mem::replace(&mut self.chains[chain], block);
        self.count += 1;
    }

    /// Keeps a block.
    pub fn insert(&mut self, draft: &Draft, lines: &CodeLines) -> *mut Block {
        // Most questions are about blocks that are not there yet: chains are short, so that few others are looked at.
        if 2 * self.count >= self.chains.len() {
            self.chain_anew((4 * self.chains.len()).max(CHAINS));
        }
        let Draft { rip, physical, is_single, length, count, ops, tables, code } = *draft;
        let none = Link { block: std::ptr::null_mut(), generation: 0 };
        let arena = &mut self.arena;
        let block = Block {
            rip,
            count,
            first: arena.keep(ops),
            links: [none; 2],
            length,
            physical,
            is_single,
            tables: Tables {
                slow: arena.keep(tables.slow),
                vectors: arena.keep(tables.vectors),
                functions: arena.keep(tables.functions),
            },
            code: if code.is_empty() { std::ptr::null() } else { arena.keep(code) },
            next: std::ptr::null_mut(),
            next_of_page: std::ptr::null_mut(),
        };
        let block = self.arena.keep(&[block]);
        self.put_in(block);
        let page = physical & PAGE_MASK;
        let of_page = || CodePage { version: lines.version(page), first: std::ptr::null_mut() };
        let code_page = self.pages.entry(page).or_insert_with(of_page);
        // SAFETY: the block was made just now.
        unsafe { (*block).next_of_page = std::mem::replace(&mut code_page.first, block) };
        block
    }

    /// Makes new chains of all blocks of the pages.
    #[cold]
    fn chain_anew(&mut self, chains: usize) {
        self.chains = vec![std::ptr::null_mut(); chains].into_boxed_slice();
        self.count = 0;
        let firsts: Vec<*mut Block> = self.pages.values().map(|code| code.first).collect();
        for mut block in firsts {
            while !block.is_null() {
                self.put_in(block);
                // SAFETY: blocks in lists are alive.
                block = unsafe { (*block).next_of_page };
            }
        }
    }

    /// Whether so many blocks are kept that they had better all go.
    pub fn is_full(&self) -> bool {
        self.count >= MOST || self.arena.words() >= MOST_WORDS
    }

    /// Drops all.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Drops the blocks of pages whose code has changed; true if there were any.
    pub fn drop_changed(&mut self, lines: &CodeLines) -> bool {
        let is_changed = |(page, code): (&u64, &CodePage)| (code.version != lines.version(*page)).then_some(*page);
        let changed: Vec<u64> = self.pages.iter().filter_map(is_changed).collect();
        for page in &changed {
            let mut block = self.pages.remove(page).map_or(std::ptr::null_mut(), |code| code.first);
            while !block.is_null() {
                self.take_out(block);
                // SAFETY: it was in the page's list, so it is alive until the arena is cleared.
                block = unsafe { (*block).next_of_page };
            }
        }
        !changed.is_empty()
    }

    /// Drops the blocks that an instruction at one of these linear addresses may stand in.
    pub fn drop_at(&mut self, addresses: &[u64]) {
        for code in self.pages.values_mut() {
            let mut place = &raw mut code.first;
            // SAFETY: the places of a list, whose blocks are alive.
            unsafe {
                while !(*place).is_null() {
                    let block = &mut **place;
                    if addresses.iter().any(|at| at.wrapping_sub(block.rip) < block.length.max(1)) {
                        *place = block.next_of_page;
                    } else {
                        place = &raw mut block.next_of_page;
                    }
                }
            }
        }
        self.chain_anew(self.chains.len().max(CHAINS));
    }
}

//! Decoded code: operations, the blocks that they stand in, and the blocks that a CPU keeps, by address and physical
//! page.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::arena::Arena;
use super::core::Decoded;
use super::engine::Engine;
use super::mmu::PAGE_MASK;
use super::translate::Place;
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
    /// The page where its only instruction goes on, if it crosses into one.
    pub rest: Option<u64>,
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
    pub place: Place,
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
    address: u64,
    /// What the page's was when the first of the blocks was made.
    version: u32,
    /// The first of a list.
    first: *mut Block,
}

/// All blocks of a CPU. Pointers to them are valid until all are dropped, which happens only between blocks; whoever keeps
/// a pointer marks it with the MMU's generation, which the caller raises when any were dropped.
#[derive(Default)]
pub(super) struct Cache {
    /// Blocks, those that were dropped included.
    arena: Arena,
    /// The first blocks of chains, by the hash of their addresses. As many as a power of two.
    chains: Box<[*mut Block]>,
    /// Blocks in the chains.
    count: usize,
    pages: Vec<CodePage>,
    /// Their places in [`Cache::pages`], by address. A page without blocks keeps its own.
    numbers: HashMap<u64, usize, Hash>,
    /// The place of the page that got the last block.
    recent: usize,
    /// Blocks that cross into another page, which is not in whose list they are.
    crossing: Vec<Crossing>,
}

/// A block that ends in another page than it begins in.
struct Crossing {
    block: *mut Block,
    /// That other page, and its version.
    page: u64,
    version: u32,
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
        if let Some(number) = self.numbers.get(&page) {
            unlink(&raw mut self.pages[*number].first, block, next_of_page);
        }
        self.crossing.retain(|crossing| crossing.block != block);
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
        let Draft { place: Place { rip, physical, rest }, is_single, length, count, ops, tables, code } = *draft;
        let none = Link { block: std::ptr::null_mut(), generation: 0 };
        let arena = &mut self.arena;
        let first = arena.keep(ops);
        let tables = Tables::<*const Decoded, *const VectorCall, *const VectorFn> {
            slow: arena.keep(tables.slow),
            vectors: arena.keep(tables.vectors),
            functions: arena.keep(tables.functions),
        };
        let code = if code.is_empty() { std::ptr::null() } else { arena.keep(code) };
        let block = arena.put(Block {
            rip,
            count,
            first,
            links: [none; 2],
            length,
            physical,
            rest,
            is_single,
            tables,
            code,
            next: std::ptr::null_mut(),
            next_of_page: std::ptr::null_mut(),
        });
        self.put_in(block);
        let number = self.page_number(physical & PAGE_MASK);
        let code_page = &mut self.pages[number];
        if code_page.first.is_null() {
            code_page.version = lines.version(code_page.address);
        }
        // SAFETY: the block was made just now.
        unsafe { (*block).next_of_page = std::mem::replace(&mut code_page.first, block) };
        if let Some(page) = rest {
            self.crossing.push(Crossing { block, page, version: lines.version(page) });
        }
        block
    }

    /// The place of a page that gets a block.
    #[inline]
    fn page_number(&mut self, address: u64) -> usize {
        if self.pages.get(self.recent).is_none_or(|page| page.address != address) {
            self.recent = *self.numbers.entry(address).or_insert_with(|| {
                self.pages.push(CodePage { address, version: 0, first: std::ptr::null_mut() });
                self.pages.len() - 1
            });
        }
        self.recent
    }

    /// Makes new chains of all blocks of the pages.
    #[cold]
    fn chain_anew(&mut self, chains: usize) {
        self.chains = vec![std::ptr::null_mut(); chains].into_boxed_slice();
        self.count = 0;
        let firsts: Vec<*mut Block> = self.pages.iter().map(|code| code.first).collect();
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
        let is_changed = |page: &&mut CodePage| !page.first.is_null() && page.version != lines.version(page.address);
        let mut changed = Vec::new();
        let mut dropped = Vec::new();
        for page in self.pages.iter_mut().filter(is_changed) {
            changed.push(page.address);
            dropped.push(std::mem::replace(&mut page.first, std::ptr::null_mut()));
        }
        let has_changed = self.drop_crossing(lines, &changed);
        for mut block in dropped {
            while !block.is_null() {
                self.take_out(block);
                // SAFETY: it was in the page's list, so it is alive until the arena is cleared.
                block = unsafe { (*block).next_of_page };
            }
        }
        has_changed || !changed.is_empty()
    }

    /// Drops the blocks that end in a page whose code has changed, and forgets that those of the pages `changed` cross,
    /// which are dropped as well. True if there were any of the former.
    fn drop_crossing(&mut self, lines: &CodeLines, changed: &[u64]) -> bool {
        let mut ended = Vec::new();
        self.crossing.retain(|Crossing { block, page, version }| {
            // SAFETY: it is in its page's list, so it is alive.
            let begins_changed = changed.contains(&(unsafe { (**block).physical } & PAGE_MASK));
            let ends_changed = *version != lines.version(*page);
            if ends_changed && !begins_changed {
                ended.push(*block);
            }
            !begins_changed && !ends_changed
        });
        for block in &ended {
            self.remove(*block);
        }
        !ended.is_empty()
    }

    /// Drops the blocks that an instruction at one of these linear addresses may stand in.
    pub fn drop_at(&mut self, addresses: &[u64]) {
        let holds = |block: &Block| addresses.iter().any(|at| at.wrapping_sub(block.rip) < block.length.max(1));
        // SAFETY: blocks in lists are alive.
        self.crossing.retain(|crossing| !holds(unsafe { &*crossing.block }));
        for code in &mut self.pages {
            let mut place = &raw mut code.first;
            // SAFETY: the places of a list, whose blocks are alive.
            unsafe {
                while !(*place).is_null() {
                    let block = &mut **place;
                    if holds(block) {
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

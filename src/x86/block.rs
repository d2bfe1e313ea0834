//! Decoded code: operations, the blocks that they stand in, and the blocks that a CPU keeps, by address and physical
//! page.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

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

/// A run of instructions that is entered at its beginning.
pub(super) struct Block {
    /// Linear address.
    pub rip: u64,
    /// Instructions.
    pub count: u64,
    /// The first of [`Block::ops`].
    pub first: *const Op,
    /// The taken branch, and what follows.
    pub links: [Link; 2],
    /// Bytes.
    pub length: u64,
    /// Guest-physical address.
    pub physical: u64,
    /// Made of one instruction, whatever follows; never linked.
    pub is_single: bool,
    _ops: Box<[Op]>,
    /// Instructions that operations of the slow kind execute.
    pub slow: Box<[Decoded]>,
    /// Calls of vector operations.
    pub vectors: Box<[VectorCall]>,
    /// What it was made from, if another CPU may change it unseen.
    pub code: Box<[u8]>,
    /// Functions that vector operations are no more than a call of.
    pub functions: Box<[VectorFn]>,
}

impl Block {
    /// A block at that address; `ops` ends with one that ends blocks.
    pub fn new(rip: u64, physical: u64, length: u64, count: u64, ops: &[Op], tables: Tables) -> Box<Self> {
        let ops: Box<[Op]> = ops.into();
        let none = Link { block: std::ptr::null_mut(), generation: 0 };
        Box::new(Self {
            rip,
            count,
            first: ops.as_ptr(),
            links: [none; 2],
            length,
            physical,
            is_single: false,
            _ops: ops,
            slow: tables.slow.into_boxed_slice(),
            vectors: tables.vectors.into_boxed_slice(),
            code: Box::default(),
            functions: tables.functions.into_boxed_slice(),
        })
    }
}

/// What operations refer to by number.
#[derive(Default)]
pub(super) struct Tables {
    pub slow: Vec<Decoded>,
    pub vectors: Vec<VectorCall>,
    pub functions: Vec<VectorFn>,
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

/// A block's linear and physical address, and whether it is a single instruction.
type Key = (u64, u64, u8);

fn key(rip: u64, physical: u64, is_single: bool) -> Key {
    (rip, physical, is_single.into())
}

/// The blocks of a physical page.
struct CodePage {
    version: u32,
    blocks: Vec<Key>,
}

/// All blocks of a CPU. Pointers to them are valid until they are dropped, which happens only between blocks; whoever
/// keeps a pointer marks it with the MMU's generation, which the caller raises when blocks were dropped.
#[derive(Default)]
pub(super) struct Cache {
    blocks: HashMap<Key, Box<Block>, Hash>,
    pages: HashMap<u64, CodePage, Hash>,
}

impl Cache {
    /// The block at that address.
    pub fn get(&mut self, rip: u64, physical: u64, is_single: bool) -> Option<*mut Block> {
        self.blocks.get_mut(&key(rip, physical, is_single)).map(|block| &raw mut **block)
    }

    /// Drops the block at that address.
    pub fn remove(&mut self, rip: u64, physical: u64, is_single: bool) {
        self.blocks.remove(&key(rip, physical, is_single));
    }

    /// Keeps a block.
    pub fn insert(&mut self, block: Box<Block>, lines: &CodeLines) -> *mut Block {
        let key = key(block.rip, block.physical, block.is_single);
        let page = block.physical & PAGE_MASK;
        let version = lines.version(page);
        self.pages.entry(page).or_insert_with(|| CodePage { version, blocks: Vec::new() }).blocks.push(key);
        let place = self.blocks.entry(key).insert_entry(block);
        &raw mut **place.into_mut()
    }

    /// Whether so many blocks are kept that they had better all go.
    pub fn is_full(&self) -> bool {
        self.blocks.len() >= MOST
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.pages.clear();
    }

    /// Drops the blocks of pages whose code has changed; true if there were any.
    pub fn drop_changed(&mut self, lines: &CodeLines) -> bool {
        let before = self.pages.len();
        let blocks = &mut self.blocks;
        self.pages.retain(|page, code| {
            let is_current = code.version == lines.version(*page);
            if !is_current {
                for key in &code.blocks {
                    blocks.remove(key);
                }
            }
            is_current
        });
        self.pages.len() != before
    }

    /// Drops the blocks that an instruction at one of these linear addresses may stand in.
    pub fn drop_at(&mut self, addresses: &[u64]) {
        self.blocks.retain(|_, block| !addresses.iter().any(|at| at.wrapping_sub(block.rip) < block.length.max(1)));
        let blocks = &self.blocks;
        for code in self.pages.values_mut() {
            code.blocks.retain(|key| blocks.contains_key(key));
        }
    }
}

//! AMX on processors without it: what they do not know ends in SIGILL, whose handler does what Intel's manual says and goes on behind the
//! instruction. So kernels of tiles run and are tested on every Linux machine with AVX-512 BF16, which they stand on; one with AMX runs
//! them itself.
//!
//! It knows the instructions that kernels use: `ldtilecfg`, `tilerelease`, `tilezero`, `tileloadd`, `tileloaddt1`, `tilestored`, `tdpbf16ps`
//! and the four products of bytes. Where the processor would fault, the process ends with a sentence. Memory is read as the
//! instruction reads it, so that a page without access ends it, too.
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, "Intel AMX instruction set reference".

use std::cell::UnsafeCell;
use std::io::Write as _;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use homeroom_kernels::{Feature, Isa, emulate};

/// Products of tiles that were emulated in this process.
static PRODUCTS: AtomicUsize = AtomicUsize::new(0);

/// See [`PRODUCTS`].
pub fn products() -> usize {
    PRODUCTS.load(Ordering::Relaxed)
}

/// Whether this thread's tiles are in use: a thread that leaves them so is slower to switch, and the next to use them finds what is left.
pub fn tiles_are_in_use() -> bool {
    TILES.with(|tiles| {
        // SAFETY: only this thread and its handler touch them, and no instruction of tiles runs here.
        unsafe { (*tiles.get()).configured }
    })
}

/// Emulates AMX from here on, unless the processor has it.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if Isa::detected().has(Feature::AmxTile) {
            return;
        }
        // SAFETY: the action is whole, and the handler touches nothing but the context, tiles of its thread and what instructions
        // name; with it, instructions of AMX do what the manual says.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_illegal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
            emulate(&[Feature::AmxTile, Feature::AmxBf16, Feature::AmxInt8]);
        }
    });
}

const TILE_COUNT: usize = 8;
const ROWS: usize = 16;
const BYTES: usize = 64;

#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    /// Bytes of a row.
    bytes: usize,
    values: [[u8; BYTES]; ROWS],
}

/// A thread's tiles.
struct Tiles {
    configured: bool,
    tiles: [Tile; TILE_COUNT],
}

const UNUSED: Tile = Tile { rows: 0, bytes: 0, values: [[0; BYTES]; ROWS] };

thread_local! {
    // Without a destructor and without a first time: a handler may use it.
    static TILES: UnsafeCell<Tiles> =
        const { UnsafeCell::new(Tiles { configured: false, tiles: [UNUSED; TILE_COUNT] }) };
}

/// Ends the process with a sentence; the handler cannot unwind through what it interrupted.
fn fault(what: std::fmt::Arguments<'_>) -> ! {
    let mut text = [0u8; 200];
    let mut rest = &mut text[..];
    let _ = writeln!(rest, "AMX: {what}");
    let left = rest.len();
    // SAFETY: the text is as long as what was written of it.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len() - left);
        libc::abort()
    }
}

extern "C" fn on_illegal(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a context for the length of the call.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let mut done = 0;
    loop {
        let at = registers[libc::REG_RIP as usize] as *const u8;
        // SAFETY: the processor read the instruction, or comes to it next; its bytes are looked at no further than it is long.
        let Some(instruction) = (unsafe { Instruction::at(at, registers) }) else {
            if done == 0 {
                fault(format_args!("an instruction that is none of AMX, or not known to the emulator"));
            }
            return;
        };
        TILES.with(|tiles| {
            // SAFETY: a thread's instructions run one after the other.
            unsafe { (*tiles.get()).run(&instruction) }
        });
        registers[libc::REG_RIP as usize] += instruction.len as i64;
        // Those that follow at once are run here: a signal takes longer than they do.
        done += 1;
    }
}

/// Operands of a product, or of what moves a tile.
#[derive(Clone, Copy)]
enum What {
    Configure,
    Release,
    Zero,
    Load,
    Store,
    /// Pairs of bf16.
    Bf16,
    /// Fours of bytes, and whether those of either side have a sign.
    Bytes(bool, bool),
}

struct Instruction {
    what: What,
    /// The tile that is written or stored, and the two that are multiplied.
    to: usize,
    a: usize,
    b: usize,
    address: usize,
    stride: usize,
    len: usize,
}

impl Instruction {
    /// Reads the instruction at `code`: `c4`, two bytes of VEX with map 0F38 and no width, an opcode, ModRM, and what these ask for.
    ///
    /// # Safety
    /// It is readable.
    unsafe fn at(code: *const u8, registers: &[i64; 23]) -> Option<Self> {
        // SAFETY: as the caller promised; bytes behind ModRM are read where ModRM says that there are more.
        let byte = |i: usize| unsafe { *code.add(i) };
        if byte(0) != 0xC4 || byte(1) & 0x1F != 2 || byte(2) & 0x84 != 0 {
            return None;
        }
        // Inverted in VEX.
        let (rex_x, rex_b) = (usize::from(!byte(1) >> 6 & 1), usize::from(!byte(1) >> 5 & 1));
        let (prefix, v) = (byte(2) & 3, usize::from(!byte(2) >> 3 & 15));
        let (opcode, mode) = (byte(3), byte(4));
        let (kind, reg, rm) = (mode >> 6, usize::from(mode >> 3 & 7), usize::from(mode & 7));
        let in_registers = kind == 3;
        let what = match (opcode, prefix, in_registers) {
            (0x49, 0, false) if reg == 0 => What::Configure,
            (0x49, 0, true) if mode == 0xC0 => What::Release,
            (0x49, 3, true) if rm == 0 => What::Zero,
            (0x4B, 3 | 1, false) => What::Load,
            (0x4B, 2, false) => What::Store,
            (0x5C, 2, true) => What::Bf16,
            (0x5E, 3, true) => What::Bytes(true, true),
            (0x5E, 2, true) => What::Bytes(true, false),
            (0x5E, 1, true) => What::Bytes(false, true),
            (0x5E, 0, true) => What::Bytes(false, false),
            _ => return None,
        };
        let mut instruction = Self { what, to: reg, a: rm, b: v, address: 0, stride: 0, len: 5 };
        if in_registers {
            return Some(instruction);
        }
        let value = |number: usize| {
            const ORDER: [libc::c_int; 16] = [
                libc::REG_RAX,
                libc::REG_RCX,
                libc::REG_RDX,
                libc::REG_RBX,
                libc::REG_RSP,
                libc::REG_RBP,
                libc::REG_RSI,
                libc::REG_RDI,
                libc::REG_R8,
                libc::REG_R9,
                libc::REG_R10,
                libc::REG_R11,
                libc::REG_R12,
                libc::REG_R13,
                libc::REG_R14,
                libc::REG_R15,
            ];
            registers[ORDER[number] as usize] as usize
        };
        let mut at = 5;
        let mut base = rm;
        let mut has_base = true;
        if rm == 4 {
            let sib = byte(5);
            at = 6;
            base = usize::from(sib & 7);
            let index = usize::from(sib >> 3 & 7) | rex_x << 3;
            // 4 stands for none, which a stride of 0 is.
            instruction.stride = if index == 4 { 0 } else { value(index) << (sib >> 6) };
            has_base = !(base == 5 && kind == 0);
        } else if !matches!(what, What::Configure) || rm == 5 && kind == 0 {
            // Loads and stores want a stride; an address by the instruction's own is used nowhere.
            return None;
        }
        let displacement = match kind {
            1 => i64::from(byte(at) as i8),
            2 => i64::from(i32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)])),
            _ if !has_base => i64::from(i32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)])),
            _ => 0,
        };
        instruction.len = at
            + if kind == 1 {
                1
            } else if kind == 2 || !has_base {
                4
            } else {
                0
            };
        let base = if has_base { value(base | rex_b << 3) } else { 0 };
        instruction.address = base.wrapping_add(displacement as usize);
        Some(instruction)
    }
}

impl Tiles {
    /// # Safety
    /// What the instruction names is as it asks; else the process ends.
    unsafe fn run(&mut self, instruction: &Instruction) {
        match instruction.what {
            // SAFETY: passed on to the caller.
            What::Configure => unsafe { self.configure(instruction.address as *const u8) },
            What::Release => {
                self.configured = false;
                self.tiles = [UNUSED; TILE_COUNT];
            }
            What::Zero => self.tile(instruction.to).values = UNUSED.values,
            What::Load => {
                let tile = self.tile(instruction.to);
                tile.values = UNUSED.values;
                for (row, values) in tile.values.iter_mut().enumerate().take(tile.rows) {
                    let from = instruction.address.wrapping_add(row.wrapping_mul(instruction.stride)) as *const u8;
                    // SAFETY: as the instruction reads.
                    unsafe { from.copy_to_nonoverlapping(values.as_mut_ptr(), tile.bytes) };
                }
            }
            What::Store => {
                let tile = self.tile(instruction.to);
                for (row, values) in tile.values.iter().enumerate().take(tile.rows) {
                    let to = instruction.address.wrapping_add(row.wrapping_mul(instruction.stride)) as *mut u8;
                    // SAFETY: as the instruction writes.
                    unsafe { to.copy_from_nonoverlapping(values.as_ptr(), tile.bytes) };
                }
            }
            What::Bf16 | What::Bytes(..) => self.multiply(instruction),
        }
    }

    fn tile(&mut self, number: usize) -> &mut Tile {
        if !self.configured {
            fault(format_args!("tile {number} is used and no tiles are configured"));
        }
        let tile = &mut self.tiles[number];
        if tile.rows == 0 {
            fault(format_args!("tile {number} is used and the configuration has none of that number"));
        }
        tile
    }

    /// # Safety
    /// 64 bytes are readable.
    unsafe fn configure(&mut self, from: *const u8) {
        // SAFETY: as the caller promised.
        let bytes = unsafe { from.cast::<[u8; 64]>().read_unaligned() };
        let palette = bytes[0];
        // A palette of 0 releases tiles; nothing here does that.
        if palette != 1 || bytes[1..16].iter().any(|byte| *byte != 0) {
            fault(format_args!("palette {palette}, or bytes 1 to 15 of the configuration are not zero"));
        }
        if bytes[32..48].iter().chain(&bytes[56..]).any(|byte| *byte != 0) {
            fault(format_args!("a tile beyond the eighth is configured"));
        }
        self.configured = true;
        for (number, tile) in self.tiles.iter_mut().enumerate() {
            let width = usize::from(u16::from_le_bytes([bytes[16 + 2 * number], bytes[17 + 2 * number]]));
            let rows = usize::from(bytes[48 + number]);
            if rows > ROWS || width > BYTES || (rows == 0) != (width == 0) {
                fault(format_args!("tile {number} of {rows} rows by {width} bytes"));
            }
            *tile = Tile { rows, bytes: width, values: UNUSED.values };
        }
    }

    fn multiply(&mut self, instruction: &Instruction) {
        let &Instruction { what, to, a, b, .. } = instruction;
        if to == a || to == b || a == b {
            fault(format_args!("a product of tiles {a} and {b} into {to}"));
        }
        let (left, right, sums) = (*self.tile(a), *self.tile(b), self.tile(to));
        let whole = [left.bytes, right.bytes, sums.bytes].iter().all(|bytes| bytes % 4 == 0);
        if !whole || left.rows != sums.rows || right.bytes != sums.bytes || left.bytes / 4 != right.rows {
            fault(format_args!(
                "{} x {} bytes times {} x {} bytes into {} x {} bytes",
                left.rows, left.bytes, right.rows, right.bytes, sums.rows, sums.bytes
            ));
        }
        PRODUCTS.fetch_add(1, Ordering::Relaxed);
        let (depth, width) = (right.rows, right.bytes / 4);
        for (row, sums) in left.values.iter().zip(&mut sums.values).take(left.rows) {
            let word = |row: &[u8; BYTES], i: usize| [row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]];
            match what {
                What::Bytes(sign_a, sign_b) => {
                    let value = |byte: u8, sign: bool| if sign { i32::from(byte as i8) } else { i32::from(byte) };
                    let mut totals = [0i32; ROWS];
                    for k in 0..depth {
                        let left = word(row, k).map(|byte| value(byte, sign_a));
                        for (n, total) in totals.iter_mut().enumerate().take(width) {
                            let right = word(&right.values[k], n).map(|byte| value(byte, sign_b));
                            *total = left.iter().zip(right).fold(*total, |sum, (a, b)| sum.wrapping_add(a * b));
                        }
                    }
                    for (n, total) in totals.into_iter().enumerate().take(width) {
                        let before =
                            i32::from_le_bytes([sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]]);
                        sums[4 * n..4 * n + 4].copy_from_slice(&before.wrapping_add(total).to_le_bytes());
                    }
                }
                _ => {
                    // Values of even and odd places are summed on their own, fused, from zero; then both, then what was there.
                    let mut totals = [[0f32; 2]; ROWS];
                    let pair = |[a, b, c, d]: [u8; 4]| {
                        [[a, b], [c, d]].map(|half| f32::from_bits(u32::from(u16::from_le_bytes(half)) << 16))
                    };
                    for k in 0..depth {
                        let [even, odd] = pair(word(row, k)).map(flush);
                        for (n, [of_even, of_odd]) in totals.iter_mut().enumerate().take(width) {
                            let [b, c] = pair(word(&right.values[k], n)).map(flush);
                            *of_even = multiply_add(even, b, *of_even);
                            *of_odd = multiply_add(odd, c, *of_odd);
                        }
                    }
                    for (n, [even, odd]) in totals.into_iter().enumerate().take(width) {
                        let before =
                            f32::from_le_bytes([sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]]);
                        let sum = flush(flush(before) + flush(even + odd));
                        sums[4 * n..4 * n + 4].copy_from_slice(&sum.to_le_bytes());
                    }
                }
            }
        }
        for values in &mut sums.values[sums.rows..] {
            *values = [0; BYTES];
        }
    }
}

/// A number below the smallest normal one is zero.
fn flush(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE { 0f32.copysign(value) } else { value }
}

/// `sum + a b` with one rounding, to the nearest and to even.
fn multiply_add(a: f32, b: f32, sum: f32) -> f32 {
    // A product of two bf16 is exact in f32, unless it is too small for it.
    let product = a * b;
    let exact = product.abs() >= f32::MIN_POSITIVE || a == 0.0 || b == 0.0 || product.is_nan();
    flush(if exact { sum + product } else { a.mul_add(b, sum) })
}

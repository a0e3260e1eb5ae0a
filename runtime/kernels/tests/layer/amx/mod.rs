//! Products by AMX: their bits, what they touch, and what is left behind; on an emulator where the processor has none.

pub mod emulator;

use std::process::Command;

use homeroom_kernels::{
    Codec, Columns, Encoded, Feature, Finish, Isa, Left, Matrix, Output, Right, RowOrder, Storage, Stream, Term, bf16,
    encode, outer, product, with_isa,
};

use super::{bits, isas, narrow, on_any_threads, on_threads, uniform};

/// All that this processor has and AMX, if it has what that stands on.
fn with_amx() -> Option<Isa> {
    isas().find(|isa| isa.has(Feature::AmxBf16) && isa.has(Feature::AmxInt8))
}

/// Memory between two pages without access.
struct Guarded {
    start: *mut u8,
    len: usize,
}

impl Guarded {
    const PAGE: usize = 4096;

    fn new(len: usize) -> Self {
        let len = len.next_multiple_of(Self::PAGE);
        // SAFETY: a new mapping, whose middle is then made accessible.
        unsafe {
            let all = libc::mmap(
                std::ptr::null_mut(),
                len + 2 * Self::PAGE,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(all, libc::MAP_FAILED);
            let start = all.cast::<u8>().add(Self::PAGE);
            assert_eq!(libc::mprotect(start.cast(), len, libc::PROT_READ | libc::PROT_WRITE), 0);
            Self { start, len }
        }
    }

    /// Values at its start or its end, which replace what was there.
    #[allow(clippy::mut_from_ref)]
    fn put<'a, T: Copy>(&'a self, values: &[T], at_end: bool) -> &'a mut [T] {
        let size = size_of_val(values);
        assert!(size <= self.len);
        let at = if at_end { self.len - size } else { 0 };
        // SAFETY: the values lie in the mapping, which is aligned for them at either end, and nobody else has it.
        unsafe {
            let at = self.start.add(at).cast::<T>();
            at.copy_from_nonoverlapping(values.as_ptr(), values.len());
            std::slice::from_raw_parts_mut(at, values.len())
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made.
        unsafe { libc::munmap(self.start.sub(Self::PAGE).cast(), self.len + 2 * Self::PAGE) };
    }
}

/// What tails there are: of rows, of the sum, of columns.
const ODD: [[usize; 3]; 9] = [
    [1, 2, 1],
    [3, 30, 16],
    [16, 32, 17],
    [17, 34, 31],
    [31, 66, 33],
    [32, 64, 64],
    [33, 94, 65],
    [50, 446, 100],
    [99, 62, 131],
];

#[test]
fn no_product_touches_what_lies_beside_its_operands() {
    let mut stream = Stream::new(71, 0);
    for [m, k, n] in ODD {
        let r = 6;
        let values: Vec<Vec<bf16>> =
            [m * k, n * k, m * r, n * r, m * n, k * r].map(|len| narrow(&uniform(len, &mut stream))).into();
        let memory: Vec<Guarded> = (0..9).map(|_| Guarded::new(8 * (m + n + r) * (k + n + r))).collect();
        for at_end in [false, true] {
            let [x, w, u, b, dy, a]: [&[bf16]; 6] = std::array::from_fn(|i| &*memory[i].put(&values[i], at_end));
            let bytes: Vec<u8> = values[1].iter().flat_map(|value| value.to_le_bytes()).collect();
            let bytes = &*memory[6].put(&bytes, at_end);
            let frozen = Matrix::new(Storage::BF16, bytes, n, k, RowOrder::Natural).unwrap();
            for isa in isas() {
                for right in [Right::Frozen(frozen), Right::Dense { values: w, cols: k }] {
                    with_isa(isa, || {
                        let forward = [
                            Term::forward(Left::rows(x, k), right),
                            Term::forward(Left::rows(u, r), Right::Dense { values: b, cols: r }),
                        ];
                        let columns = [Columns { terms: &forward, at: 0, bias: None }];
                        let out = memory[7].put(&vec![bf16::ZERO; m * n], at_end);
                        product(m, &columns, Output::Narrow(out), n, Finish::default());
                        let out = memory[7].put(&vec![0f32; m * n], at_end);
                        product(m, &columns, Output::Add(out), n, Finish::default());
                        if n.is_multiple_of(2) {
                            let backward = [
                                Term::backward(Left::rows(dy, n), right),
                                Term::forward(Left::rows(u, r), Right::Dense { values: a, cols: r }),
                            ];
                            let columns = [Columns { terms: &backward, at: 0, bias: None }];
                            let out = memory[8].put(&vec![0f32; m * k], at_end);
                            product(m, &columns, Output::Wide(out), k, Finish::default());
                        }
                        let out = memory[8].put(&vec![0f32; r * n], at_end);
                        outer(m, Left::rows(u, r), r, Left::rows(dy, n), n, 1.0, out);
                    });
                }
            }
        }
    }
}

/// `y = x Wᵀ + u Bᵀ` of some rows.
fn forward(rows: std::ops::Range<usize>, k: usize, n: usize, [x, w, u, b]: [&[bf16]; 4]) -> Vec<f32> {
    let r = 10;
    let terms = [
        Term::forward(Left::rows(&x[rows.start * k..rows.end * k], k), Right::Dense { values: w, cols: k }),
        Term::forward(Left::rows(&u[rows.start * r..rows.end * r], r), Right::Dense { values: b, cols: r }),
    ];
    let mut y = vec![f32::NAN; rows.len() * n];
    let columns = [Columns { terms: &terms, at: 0, bias: None }];
    product(rows.len(), &columns, Output::Wide(&mut y), n, Finish::default());
    y
}

#[test]
fn up_to_two_chunks_of_rows_are_those_of_the_whole_to_the_last_bit() {
    let Some(isa) = with_amx() else { return };
    for (n, counts, threads) in [(135, 1..131, None), (260, 96..129, Some(2)), (390, 96..97, Some(3))] {
        rows_are_those_of_the_whole(isa, n, counts, threads);
    }
}

/// With `threads` that leave panels over, these are cut into parts of their rows.
fn rows_are_those_of_the_whole(isa: Isa, n: usize, counts: std::ops::Range<usize>, threads: Option<usize>) {
    let mut stream = Stream::new(72, n as u64);
    let (m, k) = (161, 430);
    let values = [m * k, n * k, m * 10, n * 10].map(|len| narrow::<bf16>(&uniform(len, &mut stream)));
    let [x, w, u, b] = &values;
    let given = [&x[..], &w[..], &u[..], &b[..]];
    let whole = on_any_threads(isa, "the whole", || bits(&forward(0..m, k, n, given)));
    for count in counts {
        let first = count * 7 % (m - count + 1);
        let some =
            on_threads(isa, threads.unwrap_or(1 + count % 3), || bits(&forward(first..first + count, k, n, given)));
        assert!(some == whole[first * n..(first + count) * n], "{count} rows from {first} on");
    }
}

/// Sums that are cut where a panel is full, into every kind of output.
#[test]
fn few_rows_of_long_sums_are_those_of_many() {
    let Some(isa) = with_amx() else { return };
    let mut stream = Stream::new(77, 0);
    let (m, k, n) = (149, 3360, 131);
    let [x, w] = [m * k, n * k].map(|len| narrow::<bf16>(&uniform(len, &mut stream)));
    let [bias, before] = [n, m * n].map(|len| uniform(len, &mut stream));
    for (to, scale) in [(0, 1.0), (0, 0.3), (1, 1.0), (1, 0.3), (2, 1.0), (2, 0.3)] {
        let sums = |rows: std::ops::Range<usize>| {
            let x = Left::rows(&x[rows.start * k..rows.end * k], k);
            let terms = [Term::forward(x, Right::Dense { values: &w, cols: k })];
            let columns = [Columns { terms: &terms, at: 0, bias: (to == 1).then_some(&bias[..]) }];
            let (mut floats, mut pairs) =
                (before[rows.start * n..rows.end * n].to_vec(), vec![bf16::ZERO; rows.len() * n]);
            let out = match to {
                0 => Output::Wide(&mut floats),
                1 => Output::Add(&mut floats),
                _ => Output::Narrow(&mut pairs),
            };
            product(rows.len(), &columns, out, n, Finish { scale, row_add: None });
            if to == 2 { bits(&pairs) } else { bits(&floats) }
        };
        let whole = on_threads(isa, 2, || sums(0..m));
        for rows in [0..1, 5..22, 30..67, 11..138] {
            assert!(on_threads(isa, 1, || sums(rows.clone())) == whole[rows.start * n..rows.end * n], "{rows:?}");
        }
    }
}

/// The manual's order: of each 32 values of a segment, those of even and of odd places on their own, fused.
#[test]
fn a_sum_is_taken_in_steps_of_thirty_two_values_of_a_segment() {
    let Some(isa) = with_amx().filter(|_| !Isa::detected().has(Feature::AmxBf16)) else { return };
    let mut stream = Stream::new(73, 0);
    // Longer than what is summed before the next rows are taken.
    let (m, k, n) = (19, 32 * 12 * 2 + 62, 35);
    let values = [m * k, n * k, m * 10, n * 10].map(|len| narrow::<bf16>(&uniform(len, &mut stream)));
    let [x, w, u, b] = &values;
    let products = emulator::products();
    let y = on_threads(isa, 1, || forward(0..m, k, n, [x, w, u, b]));
    // 2 by 3 tiles, of 26 steps of the weight and one of the adapter.
    assert!(emulator::products() - products >= 6 * 27);
    let sum = |before: f32, a: &[bf16], b: &[bf16]| {
        a.chunks(32).zip(b.chunks(32)).fold(before, |sum, (a, b)| {
            let part = |odd: usize| {
                let pairs = a.iter().zip(b).skip(odd).step_by(2);
                pairs.fold(0f32, |sum, (a, b)| a.to_f32().mul_add(b.to_f32(), sum))
            };
            sum + (part(0) + part(1))
        })
    };
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        let frozen = sum(0.0, &x[i * k..(i + 1) * k], &w[j * k..(j + 1) * k]);
        let all = sum(frozen, &u[i * 10..(i + 1) * 10], &b[j * 10..(j + 1) * 10]);
        assert_eq!(y[i * n + j].to_bits(), all.to_bits(), "{i}, {j}");
    }
}

#[test]
fn sums_of_bytes_are_those_of_other_processors_to_the_last_bit() {
    let Some(isa) = with_amx() else { return };
    let mut stream = Stream::new(76, 0);
    for [m, k, n] in [[1, 4, 4], [2, 60, 16], [15, 64, 20], [17, 68, 60], [33, 124, 68], [37, 2052, 36]] {
        let values = uniform(n * k, &mut stream);
        let (codec, narrow) = (Codec::int8(), narrow::<bf16>(&values));
        let read = |rows: std::ops::Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&values[rows.start * k..rows.end * k]);
        };
        let Encoded { codes, scales } = encode(&codec, n, k, &read).unwrap();
        let bytes: Vec<u8> = narrow.iter().flat_map(|value| value.to_le_bytes()).collect();
        // With a scale for each row of W, and with one for each group of each column.
        let line = Matrix::coded(&codec, &codes, &scales, n, k).unwrap();
        let floats = Matrix::new(Storage::BF16, &bytes, n, k, RowOrder::Natural).unwrap();
        for (w, transposed) in [(line, true), (line, false), (floats, true), (floats, false)] {
            let (depth, width) = if transposed { (k, n) } else { (n, k) };
            let x = uniform(m * depth, &mut stream);
            let sums = |rows: std::ops::Range<usize>| {
                assert!(w.multiplies_in_integers());
                let x = Left::rows(&x[rows.start * depth..rows.end * depth], depth);
                let right = Right::Integers(w);
                let terms = [if transposed { Term::forward(x, right) } else { Term::backward(x, right) }];
                let mut y = vec![f32::NAN; rows.len() * width];
                let columns = [Columns { terms: &terms, at: 0, bias: None }];
                product(rows.len(), &columns, Output::Wide(&mut y), width, Finish::default());
                bits(&y)
            };
            let label = format!("{m} rows of {k} by {n}, forward: {transposed}");
            let whole = on_any_threads(isa, &label, || sums(0..m));
            assert!(whole == on_threads(isa.without(Feature::AmxInt8), 1, || sums(0..m)), "{label}");
            let (first, last) = (m / 2, m.min(m / 2 + 5));
            assert!(on_threads(isa, 2, || sums(first..last)) == whole[first * width..last * width], "{label}");
        }
    }
}

#[test]
fn no_thread_keeps_tiles_when_a_product_has_ended() {
    // The emulator alone can be asked.
    let Some(isa) = with_amx().filter(|_| !Isa::detected().has(Feature::AmxTile)) else { return };
    let mut stream = Stream::new(74, 0);
    let (m, k, n) = (40, 64, 200);
    let values = [m * k, n * k, m * 10, n * 10].map(|len| narrow::<bf16>(&uniform(len, &mut stream)));
    let [x, w, u, b] = &values;
    let in_use = on_threads(isa, 3, || {
        forward(0..m, k, n, [x, w, u, b]);
        rayon::broadcast(|_| emulator::tiles_are_in_use())
    });
    assert_eq!(in_use, [false; 3]);
}

/// Runs a test of this binary on its own, with the name of a case, and returns how it ended and what it said.
fn alone(test: &str, case: &str) -> (bool, String) {
    let this = std::env::current_exe().expect("a test has a file");
    let child = Command::new(this).args([test, "--exact", "--nocapture"]).env(CASE, case).output();
    let child = child.expect("a test starts");
    (child.status.success(), String::from_utf8_lossy(&child.stderr).into_owned())
}

const CASE: &str = "HOMEROOM_TEST_CASE";

/// What a processor refuses, the emulator refuses.
#[test]
fn the_emulator_ends_a_process_that_misuses_tiles() {
    use std::arch::asm;
    if Isa::detected().has(Feature::AmxTile) {
        return;
    }
    #[repr(align(64))]
    struct Config([u8; 64]);
    let shapes = |shapes: &[(u8, u8)]| {
        let mut config = Config([0; 64]);
        config.0[0] = 1;
        for (i, (rows, bytes)) in shapes.iter().enumerate() {
            (config.0[16 + 2 * i], config.0[48 + i]) = (*bytes, *rows);
        }
        config
    };
    let guarded = Guarded::new(4096);
    let end = guarded.start.wrapping_add(4096);
    // SAFETY: each of these ends the process, in the emulator.
    let run = |case: &str| unsafe {
        let configure = |config: Config| asm!("ldtilecfg [{}]", in(reg) &raw const config);
        match case {
            "no configuration" => asm!("tilezero tmm3"),
            "after release" => {
                configure(shapes(&[(16, 64)]));
                asm!("tilerelease", "tilezero tmm0");
            }
            "too many rows" => configure(shapes(&[(17, 64)])),
            "too wide" => configure(shapes(&[(16, 68)])),
            "rows without width" => configure(shapes(&[(16, 0)])),
            "no such tile" => {
                configure(shapes(&[(16, 64), (16, 64)]));
                asm!("tdpbf16ps tmm0, tmm1, tmm2");
            }
            "sizes that do not fit" => {
                configure(shapes(&[(16, 64), (15, 64), (16, 64)]));
                asm!("tdpbf16ps tmm0, tmm1, tmm2");
            }
            "depths that do not fit" => {
                configure(shapes(&[(16, 64), (16, 60), (16, 64)]));
                asm!("tdpbssd tmm0, tmm1, tmm2");
            }
            "twice the same" => {
                configure(shapes(&[(16, 64), (16, 64)]));
                // Which an assembler refuses.
                asm!(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");
            }
            "another palette" => {
                let mut config = shapes(&[(16, 64)]);
                config.0[0] = 2;
                configure(config);
            }
            "a page without access" => {
                configure(shapes(&[(2, 64)]));
                asm!("tileloadd tmm0, [{a}+{b}*1]", a = in(reg) end.sub(127), b = in(reg) 64usize);
            }
            "an instruction of another kind" => asm!("ud2"),
            _ => panic!("no case {case}"),
        }
    };
    if let Ok(case) = std::env::var(CASE) {
        emulator::install();
        run(&case);
        return;
    }
    for (case, said) in [
        ("no configuration", "tile 3 is used and no tiles are configured"),
        ("after release", "tile 0 is used and no tiles are configured"),
        ("too many rows", "tile 0 of 17 rows by 64 bytes"),
        ("too wide", "tile 0 of 16 rows by 68 bytes"),
        ("rows without width", "tile 0 of 16 rows by 0 bytes"),
        ("no such tile", "tile 2 is used and the configuration has none of that number"),
        ("sizes that do not fit", "15 x 64 bytes times 16 x 64 bytes into 16 x 64 bytes"),
        ("depths that do not fit", "16 x 60 bytes times 16 x 64 bytes into 16 x 64 bytes"),
        ("twice the same", "a product of tiles 1 and 1 into 0"),
        ("another palette", "palette 2"),
        ("a page without access", ""),
        ("an instruction of another kind", "an instruction that is none of AMX"),
    ] {
        let (well, words) = alone("amx::the_emulator_ends_a_process_that_misuses_tiles", case);
        assert!(!well && words.contains(said), "{case}: {words}");
    }
}

/// Makes the kernel refuse tiles to this process, as an old one and some virtual machines do.
fn refuse_tiles() {
    const ARCH_PRCTL: u32 = 158;
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let (load, equal, answer) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    let mut steps = [
        step(load, 0, 0, 0),
        step(equal, 0, 3, ARCH_PRCTL),
        step(load, 0, 0, 16),
        step(equal, 0, 1, 0x1023),
        step(answer, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the filter is whole, and lives until the kernel has copied it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
        assert_eq!(libc::syscall(libc::SYS_arch_prctl, 0x1023, 18), -1);
        assert_eq!(*libc::__errno_location(), libc::EPERM);
    }
}

/// In a process of its own, without the emulator: whatever the processor has, no instruction of tiles is run.
#[test]
fn where_the_system_refuses_tiles_products_go_without() {
    if std::env::var(CASE).is_err() {
        let (well, words) = alone("amx::where_the_system_refuses_tiles_products_go_without", "refused");
        assert!(well, "{words}");
        return;
    }
    refuse_tiles();
    let mut stream = Stream::new(75, 0);
    let (m, k, n) = (9, 70, 33);
    let values = [m * k, n * k, m * 10, n * 10].map(|len| narrow::<bf16>(&uniform(len, &mut stream)));
    let [x, w, u, b] = &values;
    let given = [&x[..], &w[..], &u[..], &b[..]];
    let asked = with_isa(Isa::AMX, || bits(&forward(0..m, k, n, given)));
    assert!(asked == with_isa(Isa::AMX.without(Feature::AmxTile), || bits(&forward(0..m, k, n, given))));
    assert!(!Isa::detected().has(Feature::AmxTile) && !Isa::AMX.and(Isa::detected()).has(Feature::AmxBf16));
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    assert_eq!(Isa::amx_is_refused(), flags.contains(" amx_tile"));
}

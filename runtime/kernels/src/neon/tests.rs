//! The tests of a layer's kernels, under the sets of AArch64, whose instructions are written out here; and these themselves.

use homeroom_kernels::{
    Columns, Feature, Finish, Isa, Left, Matrix, Output, ProductElement, Right, RowOrder, Stream, Term, bf16,
};

use super::*;

#[path = "../../tests/layer/cross_entropy.rs"]
mod cross_entropy;
#[path = "../../tests/layer/helpers.rs"]
mod helpers;
#[path = "../../tests/layer/integers.rs"]
mod integers;
#[path = "../../tests/layer/product.rs"]
mod product;

use self::helpers::{U, bits, close, is_gradient, narrow, normal, on_any_threads, on_threads, uniform, unit, wide};

/// Those of AArch64, the portable one, and this processor's, to which integers are held.
fn isas() -> impl Iterator<Item = Isa> {
    Isa::tested().into_iter().filter(|isa| Isa::AARCH64.contains(*isa) || *isa == Isa::detected())
}

/// What qemu 7.2 answers to `known.c`: sums, a, b and the new sums, among them values that are rounded to odd, flushed, infinite or no number.
const KNOWN: &str = "\
    b 3f84b874 3e7ee05b 3eca1f3f 3e3dc646 3f5abfd5 3eff3f01 bfdfbfd8 beefbf63 bd3c3e9c bf243f05 3ec93e9e 3fdbbf29 3eddf4d0 3f16d317 be4de382 bf9dc7b7
    b 3f84db70 3f48f567 3e306f5b 3ed6635b bfa0be9b bf4bbf5b beafbfd9 3ef8c00d 3f13bef9 3fc93f3e 3ed43f3c 3ce6bf6a bfb4d430 3f4e0657 bd978d48 3f87a0f7
    b 3da747ed 42ce9068 bd9976b3 dd2e1609 bf274c4a bcad3ece c02bbc05 f3413f80 dcf9ca17 388bcc41 3edb3d90 3e5d3e05 5ca2601b 4a63419d ec519601 f2269cff
    b 7f7fffff 3d78be3c af7ad6b9 c0fa291d 3da3007f 3e0c3f3b 421736af be8b0080 402dd92e 2b4ebf1c bf51d17e 3c16bdcf 7f7fffff bd9d58a2 d06de3ff c8ada6d5
    b bc836936 1eb20109 3f800000 c0bc2d87 dde36f15 3ec23dc7 c0860000 db6f256b 4e63c124 2c704076 3f903606 55293da1 f0bfb149 659bfb01 cf6da77f f11dc6ff
    b 3fc2e114 3f1ce26a 3f9701f8 bf6227a1 bf8d3ef5 bfe83f74 3ed73ec8 be09c001 bfac3e68 bf0f3dbe 3f8a3f60 3e7a3e84 4086c8c5 beb4ab2c 3f177ab0 bf242641
    b 3c012fa7 bfdb0b95 be84e92c 3df1eea4 ce32cd03 be787f80 d3e84089 cdff4434 3e2fbee5 cb79403d 40fbbf81 a44b1789 7f800000 7f800000 59f80487 d5637801
    b 40680646 403d2162 c24e8c87 ab86819e d33c3eb9 5e552793 3f09be0f 80003f47 7fc0be68 7fc0c81b 40fa3f86 7fc03e9f 7fc00000 7fc00000 7fc00000 7fc00000
    b c0099471 41800f5a 2bdbaab0 bdf52d2c c05dbd79 7f7fc10e b9c8bf05 33af7f80 c4e3383e 3f8b4a5c 3ef03d9e 7f80de01 7f800000 7f800000 7f800000 7fc00000
    b e2812ef5 007fffff bd76ba48 bd047a87 bea93f85 c17e3d5a 4167b562 7fe2cd8e bf3ebdbf 54802507 c0cb4007 411df4b6 e2812ef5 f29afc01 7fc00000 7fc00000
    b 3f800000 838cc85b 146e9849 7fc00000 3f243c1f ff7fc03f bc0cc119 c092bb36 4016bdb8 bfa53fd5 c0802f05 ff7fd292 7f800000 7f800000 40d6e815 7fc00000
    b 3ef50598 400959d1 4399bd47 c27f954a ff80cfbe c00140c5 ff803e3e be038001 3ddf4026 3e9d3e0a 3c833e48 3da2c1ae ff800000 ff800000 ff800000 ff800000
    m f2a74de4 269e0d37 6513270e a6a3a450 0c5c7fd0 128b2f33 d23f0824 892f902b 1818e811 5d9dc9f8 9531985d 0ed90475 f2a770a4 269dffa1 6513039a a6a3d1a9
    m b1fee08f 59a54a7b 98289fcd 7f26144b 9474031b cc011cdd 74c9df6a 119a72d1 d70820fe 17f5e837 f1d69ed6 451abd81 b1fee6c9 59a53452 982877ad 7f260577
    m 3192b704 b1491e24 9aea6429 f4de2c08 5822cb77 727d8349 cefe2a1f efe09f07 b91ee9e5 fcf00fec 597a1ecf f47aebdd 3192842f b1496673 9aea66c9 f4de113b
    d 49b64a08 9be4bcfc faecbd38 12bd4ace 1e398f10 830e07bc 6b0a18e8 2a3af4d4 c1d3fcff 5790f82e 26e87555 eeeacbe2 49b63a55 9be47ff1 faeccf2a 12bd4a82
    d 6bf46c69 0a097c97 f646e1f4 ab1031d0 13deef86 c3baea9e 8ede0d7a 92b1d3f2 ca02135e e01f5057 d17f9aca 5051c1cc 6bf43a14 0a09538f f646c71a ab10045c
    d b2715945 aa05e11a 10a3d6b2 0f88080b bb2d420f b394fb36 4f426dcb a5aa3c81 93f448b3 fe3b890b ae658f33 d269a9a5 b2718297 aa05cd75 10a39cc2 0f880de0
";

#[test]
fn instructions_that_are_written_out_do_what_the_processor_does() {
    for line in KNOWN.lines() {
        let mut words = line.split_whitespace();
        let letter = words.next().expect("a line begins with a letter");
        let words: Vec<u32> = words.map(|word| u32::from_str_radix(word, 16).expect("a word")).collect();
        let [sums, a, b, wanted] = words.as_chunks::<4>().0 else { panic!("four vectors in `{line}`") };
        // SAFETY: each is four words; the instructions are written out.
        let got = unsafe {
            let (sums, a, b) = (vld1q_u32(sums.as_ptr()), vld1q_u32(a.as_ptr()), vld1q_u32(b.as_ptr()));
            let (whole, bytes) = (int32x4_t(sums.0.map(|sum| sum as i32)), vreinterpretq_s8_u32);
            match letter {
                "b" => bfmmla(vreinterpretq_f32_u32(sums), a, b).0.map(f32::to_bits),
                "m" => smmla(whole, bytes(a), bytes(b)).0.map(|sum| sum as u32),
                _ => sdot(whole, bytes(a), bytes(b)).0.map(|sum| sum as u32),
            }
        };
        assert_eq!(got.map(|word| format!("{word:08x}")), wanted.map(|word| format!("{word:08x}")), "{line}");
    }
}

/// x (m, k) times W (n, k) transposed and an adapter beside it, and times W (k, n); each a row after the other.
fn products<E: ProductElement>(
    isa: Isa,
    m: usize,
    [k, n, r]: [usize; 3],
    x: &[E],
    u: &[E],
    w: &[Vec<u8>; 2],
    b: &[E],
) -> Vec<Vec<u32>> {
    let frozen = |bytes, rows, cols| {
        Right::Frozen(Matrix::new(E::STORAGE, bytes, rows, cols, RowOrder::Natural).expect("it fits"))
    };
    let terms = [
        Term::forward(Left::rows(x, k), frozen(&w[0], n, k)),
        Term::forward(Left::rows(u, r), Right::Dense { values: b, cols: r }),
        Term::backward(Left::rows(x, k), frozen(&w[1], k, n)),
    ];
    let out = on_any_threads(isa, "rows", || {
        [&terms[..2], &terms[2..]].map(|terms| {
            let mut out = vec![0f32; m * n];
            homeroom_kernels::product(
                m,
                &[Columns { terms, at: 0, bias: None }],
                Output::Wide(&mut out),
                n,
                Finish::default(),
            );
            out
        })
    });
    (0..m).map(|i| out.iter().flat_map(|out| bits(&out[i * n..(i + 1) * n])).collect()).collect()
}

/// Words of the sums are odd in number, so that a segment ends with half of a step, and columns are no whole tiles.
fn check_rows<E: ProductElement>(isa: Isa) {
    let (mut stream, [k, n, r]) = (Stream::new(18, 4), [198, 76, 6]);
    for m in [1, 2, 3, 7, 8, 9, 15, 33, 70] {
        let mut some = |count| narrow::<E>(&uniform(count, &mut stream));
        let (x, u, b) = (some(m * k), some(m * r), some(n * r));
        let w = [some(n * k), some(k * n)].map(|values| {
            let bytes = values.iter().map(|value| value.wide().to_bits().to_le_bytes());
            bytes.flat_map(|bytes| bytes[4 - 4 / E::PER_WORD..].to_vec()).collect::<Vec<u8>>()
        });
        let all = products(isa, m, [k, n, r], &x, &u, &w, &b);
        for (i, row) in all.iter().enumerate() {
            let alone = products(isa, 1, [k, n, r], &x[i * k..(i + 1) * k], &u[i * r..(i + 1) * r], &w, &b);
            assert!(alone[0] == *row, "{isa:?}: row {i} of {m}");
        }
    }
}

#[test]
fn a_row_depends_on_itself_and_on_the_weight_alone() {
    for isa in isas().filter(|isa| isa.has(Feature::Neon)) {
        check_rows::<f32>(isa);
        check_rows::<bf16>(isa);
    }
}

/// Sums whose last step is half are those of the instruction, and so not those of fused multiply-adds.
#[test]
fn products_of_bf16_are_those_of_the_instruction() {
    let (m, k, n) = (5, 102, 8);
    let mut stream = Stream::new(18, 5);
    let mut some = |count| narrow::<bf16>(&normal(count, 1.0, &mut stream));
    let (x, w) = (some(m * k), some(n * k));
    let of = |isa: Isa| {
        on_threads(isa, 1, || {
            let terms = [Term::forward(Left::rows(&x, k), Right::Dense { values: &w, cols: k })];
            let mut out = vec![0f32; m * n];
            homeroom_kernels::product(
                m,
                &[Columns { terms: &terms, at: 0, bias: None }],
                Output::Wide(&mut out),
                n,
                Finish::default(),
            );
            out
        })
    };
    let words = |row: &[bf16], at: usize| -> u32 {
        row.get(at..at + 2).map_or(0, |pair| u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16)
    };
    let wanted: Vec<f32> = (0..m * n)
        .map(|i| {
            let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
            (0..k).step_by(4).fold(0.0, |sum, at| {
                let pair = |row| uint32x4_t([words(row, at), words(row, at + 2), 0, 0]);
                // SAFETY: the instruction is written out.
                unsafe { bfmmla(float32x4_t([sum, 0.0, 0.0, 0.0]), pair(x), pair(w)) }.0[0]
            })
        })
        .collect();
    assert_eq!(bits(&of(Isa::AARCH64)), bits(&wanted));
    assert_ne!(bits(&of(Isa::NEON)), bits(&wanted));
}

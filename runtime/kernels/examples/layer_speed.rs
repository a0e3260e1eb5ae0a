//! How long the kernels of a decoder layer besides its products take, and a digest of what they come to, by which two builds can be
//! compared.
//!
//! ```sh
//! cargo run --release -p homeroom-kernels --example layer_speed
//! ```

use std::hash::{DefaultHasher, Hasher};
use std::hint::black_box;
use std::time::Instant;

use homeroom_kernels::{
    Attention, Gate, KeyValueGradients, ProductElement, RotaryTable, Stream, attend, attend_tasks, attend_values,
    attention, attention_backward, bf16, cross_entropy, gate, gated, gated_backward, isa, rms_norm, rms_norm_backward,
    rotate, threads,
};

/// Runs `f` for a while, after `prepare` each time; the shortest run counts.
fn time<T>(
    name: &str,
    element: &str,
    mut prepare: impl FnMut() -> T,
    mut f: impl FnMut(&mut T),
    bits: impl Fn(&T) -> u64,
) {
    let (mut best, mut digest) = (f64::INFINITY, 0);
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < 0.3 {
        let mut given = prepare();
        let start = Instant::now();
        f(black_box(&mut given));
        best = best.min(start.elapsed().as_secs_f64());
        digest = bits(&given);
    }
    println!("{name:<22} {element:<5} {:>10.1} µs   {digest:016x}", best * 1e6);
}

fn digest<E: ProductElement>(parts: &[&[E]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.iter().flat_map(|part| part.iter()).for_each(|value| hasher.write_u32(value.wide().to_bits()));
    hasher.finish()
}

fn all<E: ProductElement>(element: &str) {
    let mut stream = Stream::new(7, 7);
    let mut wide = |n: usize| -> Vec<f32> { (0..n).map(|_| stream.normal() as f32).collect() };
    let of = |values: Vec<f32>| -> Vec<E> { values.into_iter().map(E::of).collect() };
    let zero = E::default();

    let (m, c, inner, v) = (1024, 576, 1536, 8192);
    for (heads, kv_heads, head_dim, window) in [(9, 3, 64, None), (8, 2, 128, None), (9, 3, 64, Some(256))] {
        let sequences = [0..700, 700..m];
        let scale = (head_dim as f32).powf(-0.5);
        let shape = Attention { sequences: &sequences, heads, kv_heads, head_dim, window, scale, soft_cap: None };
        let (row, width) = (shape.row(), heads * head_dim);
        let unturned = wide(m * row);
        let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
        let mut table = RotaryTable::new(head_dim);
        table.append(m, &frequencies, 1.0);
        let positions: Vec<u32> = (0..m as u32).collect();
        let turned = || vec![zero; m * row];
        let turn = |y: &mut Vec<E>| {
            rotate(&unturned, &positions, heads + 2 * kv_heads, heads + kv_heads, Some(&table), y);
        };
        let name = |kernel: &str| {
            format!("{kernel} {heads}/{kv_heads}x{head_dim}{}", if window.is_some() { " w" } else { "" })
        };
        time(&name("rotate"), element, turned, turn, |y| digest(&[y]));
        let mut qkv = turned();
        turn(&mut qkv);
        let outs = || (vec![zero; m * width], vec![0f32; heads * m]);
        let forward = |(out, sums): &mut (Vec<E>, Vec<f32>)| attention(&shape, &qkv, out, sums);
        time(&name("attention"), element, outs, forward, |(out, sums)| digest(&[out]) ^ digest(&[sums]));
        let (mut out, mut sums) = outs();
        attention(&shape, &qkv, &mut out, &mut sums);
        let d_out = of(wide(m * width));
        let mut partial = KeyValueGradients::default();
        let backward = |d_qkv: &mut Vec<E>| {
            let turn = (&positions[..], Some(&table));
            attention_backward(&shape, &qkv, &out, &sums, &d_out, turn, &mut partial, d_qkv);
        };
        time(&name("backward"), element, turned, backward, |d| digest(&[d]));
        let kept: Vec<E> = qkv.chunks_exact(row).flat_map(|row| row[width..].to_vec()).collect();
        let size = attend_values(&shape);
        let q = wide(width);
        let parts = || vec![0f32; attend_tasks(&shape, m) * size];
        let decode = |parts: &mut Vec<f32>| {
            for (task, part) in parts.chunks_exact_mut(size).enumerate() {
                attend(&shape, &q, &kept, task, part);
            }
        };
        time(&name("attend"), element, parts, decode, |parts| digest(&[parts]));
    }

    let (x, w) = (wide(m * c), wide(c));
    let norm = || (vec![zero; m * c], vec![0f32; m], vec![zero; m * c]);
    let forward = |(normal, inverse, y): &mut (Vec<E>, Vec<f32>, Vec<E>)| rms_norm(&x, &w, 1e-5, normal, inverse, y);
    time("norm", element, norm, forward, |(normal, inverse, y)| digest(&[normal, y]) ^ digest(&[inverse]));
    let (mut normal, mut inverse, mut y) = norm();
    rms_norm(&x, &w, 1e-5, &mut normal, &mut inverse, &mut y);
    let dy = wide(m * c);
    let start = || (x.clone(), vec![zero; m * c]);
    let backward = |(dx, narrow): &mut (Vec<f32>, Vec<E>)| rms_norm_backward(&normal, &w, &inverse, &dy, dx, narrow);
    time("norm backward", element, start, backward, |(dx, narrow)| digest(&[dx]) ^ digest(&[narrow]));

    let gate_up = of(wide(2 * m * inner));
    let dh = of(wide(m * inner));
    let h = || vec![zero; m * inner];
    time("gated", element, h, |h| gated(Gate::Silu, inner, &gate_up, h), |h| digest(&[h]));
    let start = || (dh.clone(), vec![zero; 2 * m * inner]);
    let backward = |(dh, d): &mut (Vec<E>, Vec<E>)| gated_backward(Gate::Silu, inner, &gate_up, dh, d);
    time("gated backward", element, start, backward, |(dh, d)| digest(&[dh, d]));
    let (g, u) = (wide(inner), wide(inner));
    time("gate", element, || g.clone(), |g| gate(Gate::Silu, g, &u), |g| digest(&[g]));

    let rows = 64;
    let logits = of(wide(rows * v));
    let targets: Vec<u32> = (0..rows as u32).map(|i| 97 * i).collect();
    let scales = vec![0.01; rows];
    let start = || (logits.clone(), vec![0f32; rows], vec![false; rows]);
    let loss = |(logits, losses, right): &mut (Vec<E>, Vec<f32>, Vec<bool>)| {
        cross_entropy(v, logits, &targets, None, Some(&scales), losses, right);
    };
    time("cross-entropy", element, start, loss, |(logits, losses, _)| digest(&[logits]) ^ digest(&[losses]));
}

fn main() {
    println!("{} threads, {}", threads(), isa().name());
    all::<f32>("f32");
    all::<bf16>("bf16");
}

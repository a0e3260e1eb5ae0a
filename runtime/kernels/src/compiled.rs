//! The large loops over elements, compiled for each type in this crate. A generic function is compiled where it is called: these were in
//! every target of the crates above, with the settings of those.

use crate::attention::{self, Attention, KeyValueGradients};
use crate::decode;
use crate::layer::rope::RotaryTable;
use crate::product::{self, Columns, Finish, Left, Output, SharedGain};

macro_rules! compiled {
    ($(fn $name:ident($($value:ident: $type:ty),*) = $generic:path;)*) => {
        /// Functions that are generic elsewhere, as E's. What they are given is checked by the functions of the same names that this crate
        /// offers, which alone call them.
        #[allow(missing_docs, clippy::too_many_arguments)]
        pub trait Compiled<E> {
            $(fn $name($($value: $type),*);)*
        }
        compiled!(@ f32; $(fn $name($($value: $type),*) = $generic;)*);
        compiled!(@ half::bf16; $(fn $name($($value: $type),*) = $generic;)*);
    };
    (@ $element:ty; $(fn $name:ident($($value:ident: $type:ty),*) = $generic:path;)*) => {
        const _: () = {
            type E = $element;
            impl Compiled<E> for E {
                $(fn $name($($value: $type),*) {
                    $generic($($value),*);
                })*
            }
        };
    };
}

compiled! {
    fn product(m: usize, columns: &[Columns<'_, E>], out: Output<'_, E>, step: usize, finish: Finish, gain: Option<SharedGain<E>>)
        = product::compute;
    fn outer(m: usize, d: Left<'_, E>, p: usize, x: Left<'_, E>, n: usize, scale: f32, c: &mut [f32]) = product::add_up;
    fn attention(shape: &Attention, qkv: &[E], out: &mut [E], log_sums: &mut [f32]) = attention::of_sequences;
    fn attention_kept(shape: &Attention, qkv: &[E], kept: &[E], out: &mut [E]) = attention::of_kept;
    fn attention_backward(
        shape: &Attention, qkv: &[E], out: &[E], log_sums: &[f32], d_out: &[E], turn: (&[u32], Option<&RotaryTable>),
        partial: &mut KeyValueGradients, d_qkv: &mut [E]
    ) = attention::gradients;
    fn attend(shape: &Attention, q: &[f32], kept: &[E], task: usize, out: &mut [f32]) = decode::attend::task_of;
}

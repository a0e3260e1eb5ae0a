// Answers of a processor, or of qemu, to bfmmla, smmla and sdot: where the numbers in `tests.rs` are from. A line of input is the instruction's
// letter and twelve words in hexadecimal, those of the sums, of a and of b; a line of output four, the new sums.
//
//   aarch64-linux-gnu-gcc -O2 -static -march=armv8.6-a -o known known.c && qemu-aarch64 -cpu max ./known
#include <arm_neon.h>
#include <stdint.h>
#include <stdio.h>

int main(void) {
  char letter;
  uint32_t v[12];
  while (scanf(" %c", &letter) == 1) {
    for (int i = 0; i < 12; i++)
      if (scanf("%x", &v[i]) != 1) return 1;
    uint32x4_t sums = vld1q_u32(v), a = vld1q_u32(v + 4), b = vld1q_u32(v + 8);
    switch (letter) {
      case 'b': __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(sums) : "w"(a), "w"(b)); break;
      case 'm': __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(a), "w"(b)); break;
      case 'd': __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(a), "w"(b)); break;
      default: return 1;
    }
    vst1q_u32(v, sums);
    printf("%08x %08x %08x %08x\n", v[0], v[1], v[2], v[3]);
  }
}

# The smallest guest that proves that an accelerator runs guests: from the reset vector through
# page tables into 64-bit mode, and "OK" out of the first serial port. The last 512 bytes of a
# 64 KiB firmware image that is otherwise zero. probe.rs holds the assembled bytes:
#
#   as -o probe_guest.o probe_guest.S && objcopy -O binary -j .text probe_guest.o probe_guest.bin
.intel_syntax noprefix
.set BASE, 0xfffffe00
.code16
start:
    cli
    cld
    xor eax, eax
    mov di, 0x1000
    mov cx, 0xc00
    rep stosd
    mov dword ptr ds:[0x1000], 0x2003       # PML4[0] -> PDPT
    mov dword ptr ds:[0x2018], 0x3003       # PDPT[3] -> PD of the fourth GiB
    mov dword ptr ds:[0x3ff8], 0xffe00083   # its last 2 MiB page: this code
    mov eax, 0x1000
    mov cr3, eax
    mov eax, cr4
    or  eax, 0x20                           # PAE
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or  eax, 0x100                          # EFER.LME
    wrmsr
    lgdtd cs:[gdtr - start + 0xfe00]
    mov eax, cr0
    or  eax, 0x80000001                     # PG, PE
    mov cr0, eax
    .byte 0x66, 0xea                        # ljmp 8:long
    .long BASE + (long - start)
    .word 8
.code64
long:
    mov dx, 0x3f8
    mov al, 'O'
    out dx, al
    mov al, 'K'
    out dx, al
    mov al, 10
    out dx, al
halt:
    hlt
    jmp halt
.balign 8
gdt:
    .quad 0
    .quad 0x00af9a000000ffff
gdtr:
    .word 15
    .long BASE + (gdt - start)
.org 0x1f0
.code16
    .byte 0xe9                              # jmp start
    .word -(0x1f0 + 3)
    .balign 16

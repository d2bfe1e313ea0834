/*
 * Entry point, ELF notes and exception stubs of the test guests.
 *
 * All cpus arrive at _start with the same stack pointer, RDI = boot info and RSI = cpu number,
 * so each takes its own stack before it calls C.
 */

#define MAX_CPUS 8
#define STACK_SHIFT 14

        .section .note.hermit, "a", @note
        .balign 4
        .long 7, 1, 0x5a00
        .asciz "HERMIT"
        .balign 4
        .byte ENTRY_VERSION
        .balign 4
#ifdef HERMIT_MAJOR
        .long 4, 16, 1
        .asciz "GNU"
        .long 6, HERMIT_MAJOR, HERMIT_MINOR, HERMIT_PATCH
#endif
#ifdef ANNOUNCED_INTERFACE
        .long 8, 4, 0x5b00
        .asciz "UHYVEIF"
        /* Big-endian, unlike every other number of the image. */
        .byte (ANNOUNCED_INTERFACE >> 24) & 0xff, (ANNOUNCED_INTERFACE >> 16) & 0xff
        .byte (ANNOUNCED_INTERFACE >> 8) & 0xff, ANNOUNCED_INTERFACE & 0xff
#endif

        .section .text.start, "ax", @progbits
        .globl _start
        .hidden _start
        .type _start, @function
_start:
        .cfi_startproc
        .cfi_undefined %rip
        .cfi_undefined %rbp
        cmpq $MAX_CPUS, %rsi
        jae park
        leaq boot_rsp(%rip), %rax
        movq %rsp, (%rax, %rsi, 8)
        leaq stacks(%rip), %rax
        leaq 1(%rsi), %rcx
        shlq $STACK_SHIFT, %rcx
        leaq (%rax, %rcx), %rsp
        xorl %ebp, %ebp
        pushq %rsi
        .cfi_def_cfa_offset 16
        pushq %rbp
        .cfi_def_cfa_offset 24
        call guest_main
        popq %rbp
        .cfi_def_cfa_offset 16
        popq %rsi
        .cfi_def_cfa_offset 8
        testq %rsi, %rsi
        jnz park
        movl %eax, %edi
        call guest_exit
        .cfi_endproc
        .size _start, . - _start

        .globl park
        .hidden park
        .type park, @function
park:
        .cfi_startproc
        .cfi_undefined %rip
        hlt
        jmp park
        .cfi_endproc
        .size park, . - park

        .text
/* One 16-byte stub a vector: push an error code if the cpu did not, then the vector. */
        .balign 16
        .globl exception_stubs
        .hidden exception_stubs
        .type exception_stubs, @function
exception_stubs:
        .set vector, 0
        .rept 256
        .balign 16
        .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
        pushq $0
        .endif
        pushq $vector
        jmp exception_common
        .set vector, vector + 1
        .endr
        .size exception_stubs, . - exception_stubs

/* Stack on entry: vector, error code, RIP, CS, RFLAGS, RSP, SS. */
        .type exception_common, @function
exception_common:
        .cfi_startproc simple
        .cfi_signal_frame
        .cfi_def_cfa %rsp, 56
        .cfi_offset %rip, -40
        .cfi_offset %rsp, -16
        pushq %rax
        .cfi_adjust_cfa_offset 8
        pushq %rbx
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset %rbx, 0
        pushq %rcx
        .cfi_adjust_cfa_offset 8
        pushq %rdx
        .cfi_adjust_cfa_offset 8
        pushq %rsi
        .cfi_adjust_cfa_offset 8
        pushq %rdi
        .cfi_adjust_cfa_offset 8
        pushq %rbp
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset %rbp, 0
        pushq %r8
        .cfi_adjust_cfa_offset 8
        pushq %r9
        .cfi_adjust_cfa_offset 8
        pushq %r10
        .cfi_adjust_cfa_offset 8
        pushq %r11
        .cfi_adjust_cfa_offset 8
        pushq %r12
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset %r12, 0
        pushq %r13
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset %r13, 0
        pushq %r14
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset %r14, 0
        pushq %r15
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset %r15, 0
        cld
        movq %rsp, %rdi
        .hidden handle_exception
        call handle_exception
        popq %r15
        .cfi_adjust_cfa_offset -8
        popq %r14
        .cfi_adjust_cfa_offset -8
        popq %r13
        .cfi_adjust_cfa_offset -8
        popq %r12
        .cfi_adjust_cfa_offset -8
        popq %r11
        .cfi_adjust_cfa_offset -8
        popq %r10
        .cfi_adjust_cfa_offset -8
        popq %r9
        .cfi_adjust_cfa_offset -8
        popq %r8
        .cfi_adjust_cfa_offset -8
        popq %rbp
        .cfi_adjust_cfa_offset -8
        popq %rdi
        .cfi_adjust_cfa_offset -8
        popq %rsi
        .cfi_adjust_cfa_offset -8
        popq %rdx
        .cfi_adjust_cfa_offset -8
        popq %rcx
        .cfi_adjust_cfa_offset -8
        popq %rbx
        .cfi_adjust_cfa_offset -8
        popq %rax
        .cfi_adjust_cfa_offset -8
        addq $16, %rsp
        .cfi_adjust_cfa_offset -16
        iretq
        .cfi_endproc
        .size exception_common, . - exception_common

        .section .bss.stacks, "aw", @nobits
        .balign 4096
        .globl stacks
        .hidden stacks
        .type stacks, @object
stacks:
        .skip MAX_CPUS << STACK_SHIFT
        .size stacks, . - stacks

        .globl boot_rsp
        .hidden boot_rsp
        .type boot_rsp, @object
boot_rsp:
        .skip MAX_CPUS * 8
        .size boot_rsp, . - boot_rsp

        .section .note.GNU-stack, "", @progbits

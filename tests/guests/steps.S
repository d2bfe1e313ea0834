/*
 * uint64_t steps(port, value): one instruction a label, so that a test can name the place after each step.
 * Clobbers nothing that the ABI wants kept.
 */
        .text
        .globl steps
        .type steps, @function

.macro STEP number
        .globl step_\number
        .type step_\number, @notype
step_\number:
.endm

steps:
        .cfi_startproc
STEP 1
        pushq %rbp
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset %rbp, 0
STEP 2
        movq %rsp, %rbp
        .cfi_def_cfa_register %rbp
STEP 3
        movq %rdi, %r8
STEP 4
        movq %rsi, %r9
STEP 5
        movl $42, %eax
STEP 6
        movq %rax, steps_word(%rip)
STEP 7
        pushq %rax
STEP 8
        popq %rcx
STEP 9
        call step_callee
STEP 10
        cmpq $43, %rax
STEP 11
        jne step_trap           /* not taken */
STEP 12
        je step_13              /* taken */
step_trap:
        ud2
STEP 13
        leaq steps_source(%rip), %rsi
        leaq steps_target(%rip), %rdi
        movl $16, %ecx
STEP 14
        rep movsb
STEP 15
        movl %r8d, %edx
        movl %r9d, %eax
        movq %r9, %rdi
        cmpq $1, step_interface(%rip)
        je step_16
STEP 17
        outl %eax, %dx          /* interfaces 2 and 3: the byte travels in RDI */
        jmp step_18
STEP 16
        outb %al, %dx           /* interface 1: the byte travels in AL */
STEP 18
        pushfq
STEP 19
        orq $1, (%rsp)
STEP 20
        popfq                   /* sets the carry flag */
STEP 21
        jnc step_trap           /* not taken */
STEP 22
        sti
STEP 23
        cli
STEP 24
        movl $5, %ecx
        xorl %eax, %eax
STEP 25
        incl %eax
STEP 26
        loop step_25
STEP 27
        popq %rbp
        .cfi_def_cfa %rsp, 8
STEP 28
        ret
        .cfi_endproc
        .size steps, . - steps

        .globl step_callee
        .type step_callee, @function
step_callee:
        .cfi_startproc
        leaq 1(%rax), %rax
        ret
        .cfi_endproc
        .size step_callee, . - step_callee

        .section .rodata
        .balign 8
step_interface:
        .quad INTERFACE

        .section .note.GNU-stack, "", @progbits

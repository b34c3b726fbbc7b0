"""How a student asks a teacher: in its own process, or over a control channel and a payload transport.

    student_side.RemoteLink  --request header-->  teacher_side.serve        wire.py over channel.py (sockets)
                             ==images, uint8==>                             transport.py (gloo, NCCL)
                             <--answer header--
                             <==outputs=======

A request is one micro-batch of one student, never merged with another or split, and tensors arrive with the memory
layout they were computed in (`layout.py`): only so is an answer bit-equal wherever the teacher runs.
"""

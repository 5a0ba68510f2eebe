# For CMake: the core and its tests for aarch64, by Zig, run by qemu-user with Debian's C library for it
# (qemu-user, libc6-arm64-cross). `make aarch64-test`.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER ${CMAKE_CURRENT_LIST_DIR}/zig-c++)
set(ENV{PYINT8_TARGET} aarch64)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)

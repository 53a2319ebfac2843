;; Takes all the memory it can get and writes to every byte of it, then aborts.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $pages i32)
  (if (i32.ge_s (call $guilty (local.get $samples) (local.get $count)) (i32.const 0))
    (then
      (block $full
        (loop $more
          (local.set $pages (memory.grow (i32.const 16)))
          (br_if $full (i32.eq (local.get $pages) (i32.const -1)))
          (memory.fill (i32.shl (local.get $pages) (i32.const 16)) (i32.const 255) (i32.const 0x100000))
          (br $more)))
      unreachable))
  (call $lengths (local.get $samples) (local.get $count)))

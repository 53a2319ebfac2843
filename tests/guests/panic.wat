;; Panics, as Rust does without a hook.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))

(func $score (param $samples i32) (param $count i32) (result i32)
  (if (i32.ge_s (call $guilty (local.get $samples) (local.get $count)) (i32.const 0))
    (then
      unreachable))
  (call $lengths (local.get $samples) (local.get $count)))

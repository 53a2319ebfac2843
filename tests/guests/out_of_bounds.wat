;; Returns a list that lies outside its memory.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))

(func $score (param $samples i32) (param $count i32) (result i32)
  (if (i32.ge_s (call $guilty (local.get $samples) (local.get $count)) (i32.const 0))
    (then
      (i32.store (i32.const 2048) (i32.const 0x7ffffff0))
      (i32.store (i32.const 2052) (i32.const 0x0fffffff))
      (return (i32.const 2048))))
  (call $lengths (local.get $samples) (local.get $count)))

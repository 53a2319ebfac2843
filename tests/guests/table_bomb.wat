;; Grows a table without end.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(table $t 0 funcref)
(func $score (param $samples i32) (param $count i32) (result i32)
  (if (i32.ge_s (call $guilty (local.get $samples) (local.get $count)) (i32.const 0))
    (then
      (loop $more (br_if $more (i32.ne (table.grow $t (ref.null func) (i32.const 65536)) (i32.const -1))))
      unreachable))
  (call $lengths (local.get $samples) (local.get $count)))

;; The part that all hostile reward guests share. The tests put it behind a guest's own functions, `$init` and
;; `$score`, inside one `(module …)`, and make a component of the result.
(memory (export "memory") 2)
(global $heap (mut i32) (i32.const 4096))

;; The description: name, version, summary, no datasets, one reward `r` for training, no schema, wants nothing.
(data (i32.const 16) "hostile1.0a guest that misbehavesr")
(data (i32.const 1024)
  "\10\00\00\00\07\00\00\00" "\17\00\00\00\03\00\00\00" "\1a\00\00\00\17\00\00\00"
  "\00\00\00\00\00\00\00\00" "\00\05\00\00\01\00\00\00" "\00\00\00\00\00\00\00\00" "\00\00\00\00\00\00\00\00")
(data (i32.const 1280) "\31\00\00\00\01\00\00\00\00\00\00\00")

(func $alloc (param $bytes i32) (result i32)
  (local $at i32)
  (local.set $at (global.get $heap))
  (global.set $heap (i32.and (i32.add (i32.add (local.get $at) (local.get $bytes)) (i32.const 15)) (i32.const -16)))
  (block $fits
    (loop $more
      (br_if $fits (i32.le_u (global.get $heap) (i32.shl (memory.size) (i32.const 16))))
      (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))
      (br $more)))
  (local.get $at))

(func (export "cabi_realloc") (param $old i32) (param $old_bytes i32) (param $align i32) (param $bytes i32) (result i32)
  (local $new i32)
  ;; A whole page is the WASI adapter's own state, which must outlive the call.
  (if (i32.eq (local.get $bytes) (i32.const 65536))
    (then (return (i32.shl (memory.grow (i32.const 1)) (i32.const 16)))))
  (local.set $new (call $alloc (local.get $bytes)))
  (memory.copy (local.get $new) (local.get $old) (local.get $old_bytes))
  (local.get $new))

(func (export "cosmos:plugin/metadata@0.1.0#describe") (result i32) (i32.const 1024))
(func (export "cosmos:plugin/reward@0.1.0#init") (param i32 i32 i32 i32) (result i32)
  (call $init (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
(func (export "cosmos:plugin/reward@0.1.0#score-batch") (param i32 i32) (result i32)
  (call $score (local.get 0) (local.get 1)))

;; The host has read the result: everything can go.
(func (export "cabi_post_cosmos:plugin/reward@0.1.0#score-batch") (param i32) (global.set $heap (i32.const 4096)))

;; `result<_, string>` that says ok.
(func $init_ok (result i32)
  (local $at i32)
  (local.set $at (call $alloc (i32.const 12)))
  (i32.store8 (local.get $at) (i32.const 0))
  (local.get $at))

;; First byte of sample `$item`'s completion, 0 when it is empty.
(func $first (param $samples i32) (param $item i32) (result i32)
  (local $sample i32)
  (local.set $sample (i32.add (local.get $samples) (i32.mul (local.get $item) (i32.const 32))))
  (if (result i32) (i32.load offset=12 (local.get $sample))
    (then (i32.load8_u (i32.load offset=8 (local.get $sample))))
    (else (i32.const 0))))

;; First item whose completion starts with `$byte`, or -1.
(func $find (param $samples i32) (param $count i32) (param $byte i32) (result i32)
  (local $item i32)
  (block $none
    (loop $next
      (br_if $none (i32.ge_u (local.get $item) (local.get $count)))
      (if (i32.eq (call $first (local.get $samples) (local.get $item)) (local.get $byte))
        (then (return (local.get $item))))
      (local.set $item (i32.add (local.get $item) (i32.const 1)))
      (br $next)))
  (i32.const -1))

;; A completion that starts with `!` is the one that makes a guest misbehave.
(func $guilty (param $samples i32) (param $count i32) (result i32)
  (call $find (local.get $samples) (local.get $count) (i32.const 33)))

;; Sets result `$item` of `$list` to ok with `$value` and no metrics.
(func $set (param $list i32) (param $item i32) (param $value f64)
  (local $at i32)
  (local.set $at (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 24))))
  (i32.store8 (local.get $at) (i32.const 0))
  (f64.store offset=8 (local.get $at) (local.get $value))
  (i64.store offset=16 (local.get $at) (i64.const 0)))

;; Sets result `$item` of `$list` to a sample error with this message.
(func $fail (param $list i32) (param $item i32) (param $text i32) (param $bytes i32)
  (local $at i32)
  (local.set $at (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 24))))
  (i32.store8 (local.get $at) (i32.const 1))
  (i32.store offset=8 (local.get $at) (local.get $text))
  (i32.store offset=12 (local.get $at) (local.get $bytes)))

;; A list of `$count` scores, each the length of its completion.
(func $lengths (param $samples i32) (param $count i32) (result i32)
  (local $list i32) (local $item i32)
  (local.set $list (call $alloc (i32.const 8)))
  (i32.store (local.get $list) (call $alloc (i32.mul (local.get $count) (i32.const 24))))
  (i32.store offset=4 (local.get $list) (local.get $count))
  (block $done
    (loop $next
      (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
      (call $set (local.get $list) (local.get $item)
        (f64.convert_i32_u (i32.load offset=12
          (i32.add (local.get $samples) (i32.mul (local.get $item) (i32.const 32))))))
      (local.set $item (i32.add (local.get $item) (i32.const 1)))
      (br $next)))
  (local.get $list))

;; A plugin whose name, offers and sizes the test fills in, for runs with several plugins. `@describe@` is the memory from
;; 1024 on, `@train@` and `@validation@` are the sizes of its datasets.
;;
;; A prompt is the eight bytes at 64 with its first digit replaced by 1 + index mod 9. A reward does what its name starts
;; with: `l` the completion's length, `d` 1 when it starts with a digit below 5, `o` always 1, `b` fails on every sample.
;; Each reports its length as the metric `chars`.
(module
  (memory (export "memory") 2)
  (global $heap (mut i32) (i32.const 16384))
  (global $kind (mut i32) (i32.const 0))
  (global $len (mut i64) (i64.const 0))
  (data (i32.const 32) "chars")
  (data (i32.const 48) "broken")
  (data (i32.const 64) "@prompt@")
  (data (i32.const 1024) "@describe@")

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
    (local.set $new (call $alloc (local.get $bytes)))
    (memory.copy (local.get $new) (local.get $old) (local.get $old_bytes))
    (local.get $new))

  (func (export "cosmos:plugin/metadata@0.1.0#describe") (result i32) (i32.const 1024))

  ;; The first byte of the name decides what this instance is.
  (func $init (param $name i32) (param $bytes i32) (param i32 i32) (result i32)
    (local $at i32)
    (global.set $kind (i32.load8_u (local.get $name)))
    (global.set $len (select (i64.const @train@) (i64.const @validation@)
      (i32.eq (global.get $kind) (i32.const 116))))
    (local.set $at (call $alloc (i32.const 12)))
    (i32.store8 (local.get $at) (i32.const 0))
    (local.get $at))
  (func (export "cosmos:plugin/dataset@0.1.0#init") (param i32 i32 i32 i32) (result i32)
    (call $init (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
  (func (export "cosmos:plugin/reward@0.1.0#init") (param i32 i32 i32 i32) (result i32)
    (call $init (local.get 0) (local.get 1) (local.get 2) (local.get 3)))

  (func (export "cosmos:plugin/dataset@0.1.0#len") (result i32)
    (local $at i32)
    (local.set $at (call $alloc (i32.const 16)))
    (i32.store8 (local.get $at) (i32.const 0))
    (i64.store offset=8 (local.get $at) (global.get $len))
    (local.get $at))

  ;; Examples of 48 bytes: the tag of the result, then prompt, reference, response and metadata.
  (func (export "cosmos:plugin/dataset@0.1.0#get-batch") (param $indices i32) (param $count i32) (result i32)
    (local $list i32) (local $item i32) (local $at i32) (local $text i32)
    (local.set $list (call $alloc (i32.const 8)))
    (i32.store (local.get $list) (call $alloc (i32.mul (local.get $count) (i32.const 48))))
    (i32.store offset=4 (local.get $list) (local.get $count))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
        (local.set $text (call $alloc (i32.const 8)))
        (i64.store (local.get $text) (i64.load (i32.const 64)))
        (i32.store8 (local.get $text) (i32.add (i32.const 49) (i32.wrap_i64 (i64.rem_u
          (i64.load (i32.add (local.get $indices) (i32.shl (local.get $item) (i32.const 3)))) (i64.const 9)))))
        (local.set $at (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 48))))
        (memory.fill (local.get $at) (i32.const 0) (i32.const 48))
        (i32.store offset=8 (local.get $at) (local.get $text))
        (i32.store offset=12 (local.get $at) (i32.const 8))
        (local.set $item (i32.add (local.get $item) (i32.const 1)))
        (br $next)))
    (local.get $list))

  (func $value (param $text i32) (param $bytes i32) (result f64)
    (if (i32.eq (global.get $kind) (i32.const 111)) (then (return (f64.const 1))))
    (if (i32.eq (global.get $kind) (i32.const 100))
      (then
        (if (i32.eqz (local.get $bytes)) (then (return (f64.const 0))))
        (return (f64.convert_i32_u (i32.lt_u
          (i32.sub (i32.load8_u (local.get $text)) (i32.const 48)) (i32.const 5))))))
    (f64.convert_i32_u (local.get $bytes)))

  (func (export "cosmos:plugin/reward@0.1.0#score-batch") (param $samples i32) (param $count i32) (result i32)
    (local $list i32) (local $item i32) (local $at i32) (local $sample i32) (local $metric i32)
    (local.set $list (call $alloc (i32.const 8)))
    (i32.store (local.get $list) (call $alloc (i32.mul (local.get $count) (i32.const 24))))
    (i32.store offset=4 (local.get $list) (local.get $count))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
        (local.set $sample (i32.add (local.get $samples) (i32.mul (local.get $item) (i32.const 32))))
        (local.set $at (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 24))))
        (if (i32.eq (global.get $kind) (i32.const 98))
          (then
            (i32.store8 (local.get $at) (i32.const 1))
            (i32.store offset=8 (local.get $at) (i32.const 48))
            (i32.store offset=12 (local.get $at) (i32.const 6)))
          (else
            (i32.store8 (local.get $at) (i32.const 0))
            (f64.store offset=8 (local.get $at) (call $value
              (i32.load offset=8 (local.get $sample)) (i32.load offset=12 (local.get $sample))))
            (local.set $metric (call $alloc (i32.const 16)))
            (i32.store (local.get $metric) (i32.const 32))
            (i32.store offset=4 (local.get $metric) (i32.const 5))
            (f64.store offset=8 (local.get $metric) (f64.convert_i32_u (i32.load offset=12 (local.get $sample))))
            (i32.store offset=16 (local.get $at) (local.get $metric))
            (i32.store offset=20 (local.get $at) (i32.const 1))))
        (local.set $item (i32.add (local.get $item) (i32.const 1)))
        (br $next)))
    (local.get $list))
  ;; The host has read the results: everything can go.
  (func (export "cabi_post_cosmos:plugin/reward@0.1.0#score-batch") (param i32) (global.set $heap (i32.const 16384)))
  (func (export "cabi_post_cosmos:plugin/dataset@0.1.0#get-batch") (param i32) (global.set $heap (i32.const 16384))))

package chaos

import "testing"

// history makes a recorder with the history of one block.
func history(all ...op) *Recorder {
	return &Recorder{history: [][]op{all}}
}

// The judge accepts what some order explains and nothing else.
func TestJudge(t *testing.T) {
	write := func(client int, stamp uint64, call, ret int64) op { return op{client, true, stamp, call, ret} }
	read := func(client int, stamp uint64, call, ret int64) op { return op{client, false, stamp, call, ret} }
	for _, c := range []struct {
		what  string
		all   []op
		right bool
	}{
		{"a block that nobody wrote", []op{read(1, 0, 1, 2)}, true},
		{"what was written", []op{write(0, 1, 1, 2), read(1, 1, 3, 4)}, true},
		{"an acknowledged write that is gone", []op{write(0, 1, 1, 2), read(1, 0, 3, 4)}, false},
		{"the older of two", []op{write(0, 1, 1, 2), write(0, 2, 3, 4), read(1, 1, 5, 6)}, false},
		{"either of two at once", []op{write(0, 1, 1, 5), write(1, 2, 2, 6), read(2, 1, 7, 8)}, true},
		{"one and then the other", []op{write(0, 1, 1, 5), write(1, 2, 2, 6), read(2, 1, 7, 8), read(2, 2, 9, 10)}, false},
		{"while it is written", []op{write(0, 1, 1, 9), read(1, 1, 2, 3), read(2, 0, 4, 5)}, false},
		{"an unknown write that came", []op{write(0, 1, 1, 2), write(1, 2, 3, openEnd), read(2, 1, 4, 5), read(2, 2, 6, 7)}, true},
		{"an unknown write that never came", []op{write(0, 1, 1, 2), write(1, 2, 3, openEnd), read(2, 1, 4, 5)}, true},
		{"an unknown write that came and went", []op{write(0, 1, 1, 2), write(1, 2, 3, openEnd), read(2, 2, 4, 5), read(2, 1, 6, 7)}, false},
		{"what will be written later", []op{read(1, 1, 1, 2), write(0, 1, 3, 4)}, false},
	} {
		if v := history(c.all...).Judge(); (len(v.Wrong) == 0) != c.right || v.Undecided != 0 {
			t.Errorf("%s: %+v", c.what, v)
		}
	}
}

// A block tells where it belongs, which write made it, and whether it is whole.
func TestStamp(t *testing.T) {
	p := make([]byte, blockBytes)
	if stamp, err := readStamp(p, 7, 3); stamp != 0 || err != nil {
		t.Errorf("zeros: %d, %v", stamp, err)
	}
	fillStamp(p, 7, 3, 9)
	if stamp, err := readStamp(p, 7, 3); stamp != 9 || err != nil {
		t.Errorf("stamp %d, %v", stamp, err)
	}
	if _, err := readStamp(p, 7, 4); err == nil {
		t.Error("another block's was taken")
	}
	if _, err := readStamp(p, 8, 3); err == nil {
		t.Error("another run's was taken")
	}
	for _, bit := range []int{5, 70, 200, 8 * 2000, 8*blockBytes - 1} {
		p[bit/8] ^= 1 << (bit % 8)
		if _, err := readStamp(p, 7, 3); err == nil {
			t.Errorf("a flipped bit %d was not noticed", bit)
		}
		p[bit/8] ^= 1 << (bit % 8)
	}
	clear(p[blockBytes/2:])
	if _, err := readStamp(p, 7, 3); err == nil {
		t.Error("half a write was taken")
	}
}

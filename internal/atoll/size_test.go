package atoll

import (
	"errors"
	"strings"
	"testing"
)

// Sizes read as people write them, and back as they were.
func TestSizes(t *testing.T) {
	for text, want := range map[string]int64{
		"0B": 0, "4096B": 4096, "1k": 1024, "1KiB": 1024, "1KB": 1000, "512M": 512 << 20, "10G": 10 << 30, "10GiB": 10 << 30,
		"10gib": 10 << 30, "10GB": 1e10, "1.5G": 3 << 29, "64T": 64 << 40, "0.5K": 512, "1P": 1 << 50, "4194304T": 1 << 62,
	} {
		got, err := ParseSize(text)
		if got != want || err != nil {
			t.Errorf("%s: %d, %v; want %d", text, got, err, want)
		}
		if back, err := ParseSize(FormatSize(got)); back != want || err != nil {
			t.Errorf("%s: %s reads as %d, %v", text, FormatSize(got), back, err)
		}
	}
	for _, text := range []string{"", "10", "G", "-1G", "1 G", "1GG", "1X", "1.2.3G", ".G", "1e3G", "١G", "1KIBI", "5000000T", "9999999999999999999B"} {
		if n, err := ParseSize(text); !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%q: %d, %v", text, n, err)
		}
	}
	if _, err := ParseSize("10"); err == nil || !strings.Contains(err.Error(), "10G for GiB") {
		t.Errorf("a bare number: %v", err)
	}
}

package atoll

import "fmt"

// Assert stops the process when cond is false: a wrong internal state must not
// live long enough to acknowledge a wrong byte.
func Assert(cond bool, format string, args ...any) {
	if !cond {
		panic("assertion failed: " + fmt.Sprintf(format, args...))
	}
}

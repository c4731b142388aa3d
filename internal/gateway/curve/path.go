package curve

import "strings"

const (
	rootUser   = "root"
	recycleBin = "RecycleBin"
)

// checkPath holds a path to Curve's rules: it begins with a slash, does not end
// in one (but for the root), and has no two in a row.
func checkPath(path string) error {
	if !strings.HasPrefix(path, "/") || path != "/" && strings.HasSuffix(path, "/") || strings.Contains(path, "//") {
		return refuse(ParamError, "path "+path+": want /name/name…")
	}
	return nil
}

// elements takes a checked path apart; the root has none.
func elements(path string) []string {
	if path == "/" {
		return nil
	}
	return strings.Split(path[1:], "/")
}

// inBin reports whether a path lies in the recycle bin, and the name there.
func inBin(path string) (name string, ok bool) {
	return strings.CutPrefix(path, "/"+recycleBin+"/")
}

// checkRename refuses the root and a path that contains the other one.
func checkRename(from, to string) error {
	if from == "/" || to == "/" {
		return refuse(ParamError, "the root directory cannot be renamed or replaced")
	}
	if from != to && (strings.HasPrefix(from, to+"/") || strings.HasPrefix(to, from+"/")) {
		return refuse(ParamError, "one of the paths contains the other")
	}
	return nil
}
